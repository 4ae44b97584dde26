"""A whole grid in one run folder, from one TOML file: config.py, plan.py, run.py."""
