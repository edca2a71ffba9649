"""Results on disk to the pages that people read."""
