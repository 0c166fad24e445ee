"""`python -m grpo_dist bench`: how long a step takes here, and how long TRL takes for the same work.

Each trainer is a process of its own that takes a step when it is told to (`turns.py`), so that two of them alternate
step by step on one machine. TRL is left as it comes and goes first; ours is then made to write completions of the very
lengths that TRL's had, so that a pair of steps is the same work. `workloads.py` has the models and prompts, `ours.py`
and `peer.py` the two workers, `tables.py` what is printed.
"""
