"""Rewards: one file for each built-in reward, and the pool of processes that runs them (`pool.ScorerPool`).

No module here imports torch, transformers or anything distributed when it is imported, and this file imports nothing:
every scoring worker is a new Python that has to start fast.
"""
