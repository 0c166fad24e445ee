"""The counts of a model, and the memory inputs of three ranks that train it."""

from __future__ import annotations

from grpo_dist.planning.memory import Flight, MemoryInputs, ModelCounts, Passes

COUNTS = ModelCounts(parameters=1_000_003, adapters=50_001, adapted=800_000, grouped=700_000, joined=200_000,
                     persistent=4_003, num_layers=3, layer=290_000, cache_width=128, query_heads=8,
                     vocabulary=500)  # fmt: skip
INPUTS = MemoryInputs(COUNTS, Passes(700_000, 300_000, 1_000, 8.0), Flight(4, 32, 100, 64, True, 150), num_ranks=3,
                      strategy="DDP", policy_bytes=2, trained_bytes=4, copy_bytes=2, copy_decodes=True)  # fmt: skip
"""Adapters in float32 on a base in bfloat16. A third of the adapters is 16,667, of the base 333,335 rounded up."""
