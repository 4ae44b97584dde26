"""Pictures, drawn from a run's exports only."""
