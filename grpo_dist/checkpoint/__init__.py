"""Checkpoints: how a run writes, verifies and resumes them."""
