"""`python -m grpo_dist VERB`: a file for each verb."""
