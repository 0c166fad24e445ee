"""The mathematics of GRPO and its kin, pure: tensors in, tensors out."""
