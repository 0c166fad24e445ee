"""Engines that turn prompts into completions.

An engine has one method, `generate(model, requests, sampling) -> completions`, and knows nothing of ranks, rewards or
training: it is handed a model whose weights are whole.
"""

from ..algorithm.hashing import stream_key
from .engine import Engine, Request, RowEngine
from .native.engine import NativeEngine
from .paged import PagedEngine, paged_obstacle
from .sampling import Sampling

__all__ = ["Engine", "NativeEngine", "PagedEngine", "Request", "RowEngine", "Sampling", "paged_obstacle", "stream_key"]
