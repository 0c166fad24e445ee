"""What can be found out about a run before it starts, without loading weights; `check.py` puts it together."""
