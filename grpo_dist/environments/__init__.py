"""Environments and tools: users' code that models play with, in processes that can be killed."""
