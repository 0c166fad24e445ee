"""Engines that turn prompts into trajectories.

An engine is a service: requests go in, trajectories come out. It knows nothing of ranks, rewards or training. In this
process it is a decoder and a model whose weights are gathered.
"""

from .engine import Decoder, Engine, Request, awake, decode_all, sample
from .local import LoadedModel, LocalEngine
from .native.engine import NativeDecoder
from .paged import PagedDecoder, paged_obstacle
from .rows import RowDecoder
from .sampling import Sampling

__all__ = ["Decoder", "Engine", "LoadedModel", "LocalEngine", "NativeDecoder", "PagedDecoder", "Request", "RowDecoder",
           "Sampling", "awake", "decode_all", "paged_obstacle", "sample"]  # fmt: skip
