"""`python -m grpo_dist bench`: time a step on this machine, and the same step with TRL.

Each trainer is a process that takes a step on request (`turns.py`), so that the two alternate on one machine. TRL is
unchanged and takes the first step. Ours then makes completions of exactly the lengths of TRL's, so that both steps of
a pair do the same work. `workloads.py` has the models and prompts, `ours.py` and `peer.py` the two workers, and
`tables.py` the printed tables.
"""
