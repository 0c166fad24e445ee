"""Rollouts by vLLM servers over HTTP: policies go there as files, token ids come back."""
