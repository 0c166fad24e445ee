"""The memory of a rank and the counts of a step, predicted before anything is loaded."""
