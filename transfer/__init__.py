"""Frozen prompts on target models: replays, and the matrix of success rates."""
