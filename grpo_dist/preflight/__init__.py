"""Checks of a run before it starts, without loading weights. `look.py` calls the others."""
