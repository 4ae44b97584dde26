"""The published claims, one file each, found through ``registry.py``."""
