"""Rewards: one file per built-in reward, and the pool of processes that runs them (`pool.ScorerPool`).

Nothing in this package imports torch, transformers or anything distributed, and this file imports nothing at all: every
scoring worker is a fresh Python that has to start in a moment.
"""
