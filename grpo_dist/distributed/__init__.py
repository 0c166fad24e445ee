"""Ranks: how they start, speak to each other, fail together and end."""
