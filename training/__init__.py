"""Base model -> checkpoints, which are targets like any other."""
