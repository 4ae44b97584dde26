"""Attacks on a source model: the target loss, candidates, GCG, baselines, and the runner that saves
artifacts."""
