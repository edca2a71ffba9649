"""Recipes as data, and checkpoints streamed to where they run."""
