"""One suite a file: what it asks of a live model, and how it reads the answers."""
