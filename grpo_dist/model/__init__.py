"""The policy, its reference and its rollout weights: loading, packing, log-probabilities, saving."""
