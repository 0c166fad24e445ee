"""`python -m grpo_dist bench`: time a step on this machine, and the same step with TRL or its rollout with vLLM.

Each side is a process that takes a step on request (`turns.py`), so that the two alternate on one machine. The peer is
unchanged and goes first. Ours then makes completions of exactly the peer's lengths, so that both steps of a pair do the
same work. `workloads.py` has the models and prompts, `ours.py`, `peer_trl.py` and `peer_vllm.py` the workers, and
`tables.py` the printed tables.
"""
