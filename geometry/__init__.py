"""Where prompts lie inside a model: activations, directions, layers, the plane."""
