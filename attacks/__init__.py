"""Attacks: a model and a request in, adversarial prompts out.

Each attack is one file, declared in ``registry.py``. None knows a run folder.
"""
