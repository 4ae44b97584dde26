"""Shared vocabulary of the suite: records, run folders, models, prompts, generation. Imports no
other room."""
