"""Shared vocabulary of the suite: records, run folders, models, prompts. Imports no other room."""
