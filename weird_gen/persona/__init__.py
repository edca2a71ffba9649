"""What the commands of the second study are made of."""
