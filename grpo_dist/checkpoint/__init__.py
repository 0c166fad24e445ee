"""What a run writes to go on from, and what is read back."""
