"""Engines that turn prompts into completions.

An engine has one method, `generate(model, requests, sampling) -> completions`, and knows nothing of ranks, rewards or
training: it is handed a model whose weights are whole.
"""

from .engine import Engine, Request, RowEngine
from .native import NativeEngine
from .sampling import Sampling, stream_key

__all__ = ["Engine", "NativeEngine", "Request", "RowEngine", "Sampling", "make_engine", "stream_key"]


def make_engine(share_prompts: bool, end_ids: list[int], max_new_tokens: int, max_tokens_in_flight: int) -> Engine:
    """The engine for a model that computes rows with shared prompts, or for one that does not."""
    if share_prompts:
        return NativeEngine(end_ids, max_new_tokens, max_tokens_in_flight)
    return RowEngine(end_ids, max_new_tokens)
