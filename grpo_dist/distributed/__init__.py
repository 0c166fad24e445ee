"""Ranks: how they start, exchange tensors, share errors and end."""
