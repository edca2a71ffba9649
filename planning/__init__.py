"""What an experiment is: a recipe by a name, fitted to a model's depth; and sweeps of many."""
