"""The engine in this process: a decoder, and the weights it decodes with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ..model.quantized import dequantize_layers
from ..types import Trajectory
from .engine import Decoder, Request
from .fidelity import update_share
from .native.kernel import MERGED
from .sampling import Sampling


class Weights(Protocol):
    """What a decoder decodes with."""

    def sync(self) -> None:
        """Take over the policy's weights; a collective."""

    def open(self) -> AbstractContextManager[nn.Module]:
        """A context in which the model has its weights; a collective."""

    def dequantize(self) -> None:
        """From now on, have dense weights in place of quantised ones while the model is open."""

    def is_frozen(self, weight: Tensor) -> bool:
        """Whether a weight of the open model, or a part of one, has the same numbers whenever it is open."""


class LoadedModel:
    """A model that never changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def sync(self) -> None:
        """Do nothing."""

    def open(self) -> AbstractContextManager[nn.Module]:
        """See `Weights`."""
        return nullcontext(self.model)

    def dequantize(self) -> None:
        """See `Weights`."""
        dequantize_layers(self.model)

    def is_frozen(self, weight: Tensor) -> bool:
        """See `Weights`."""
        return True


class LocalEngine:
    """Decodes in this process, while it is polled."""

    is_elsewhere = False

    def __init__(
        self, decoder: Decoder, weights: Weights, decoding: dict[str, str | None], *, compact: bool = False
    ) -> None:
        self.decoder, self.weights, self.decoding, self.compact = decoder, weights, decoding, compact
        self._opened = ExitStack()
        self._model: nn.Module | None = None
        self._queue: deque[Request] = deque()
        self._sampling = Sampling()
        self._work: Iterator[list[Trajectory]] | None = None
        self._unanswered = 0

    def update_weights(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Engine`."""
        self.weights.sync()

    def wake(self) -> None:
        """See `Engine`."""
        self._model = self._opened.enter_context(self.weights.open())
        if next(self._model.parameters()).is_cuda:  # a captured step cannot take what the allocator keeps of an update
            torch.cuda.empty_cache()

    def sleep(self) -> None:
        """See `Engine`."""
        on_gpu = self._model is not None and next(self._model.parameters()).is_cuda
        self._queue.clear()
        self._work = self._model = None  # what is decoded goes with the iterator
        self._unanswered = 0
        self._opened.close()
        if on_gpu:  # pages, and what captured steps alone could use, are of other sizes than an update's tensors
            torch.cuda.empty_cache()

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """See `Engine`; the engine has to be awake."""
        if self._work is not None and sampling != self._sampling and not self._unanswered:
            self._work = None  # nothing is left in it but rows that were kept
        if self._work is not None and sampling != self._sampling:
            raise ValueError(f"{sampling} given while requests with {self._sampling} are decoded, expected the same")
        assert self._model is not None, "the engine sleeps"
        self._queue.extend(requests)
        self._unanswered += len(requests)
        if self._work is None:
            self._sampling, self._work = sampling, self.decoder.decode(self._model, self._queue, sampling)

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """See `Engine`."""
        self.decoder.release(places)

    def poll(self) -> list[Trajectory]:
        """See `Engine`."""
        if self._work is None:
            return []
        ended = next(self._work, None)
        if ended is None:
            self._work = None
            return []
        self._unanswered -= len(ended)
        return ended

    def update_share(self) -> float | None:
        """See `Engine`."""
        with self.weights.open() as model:
            merged = self.decoding["decoding"] == "compiled" and next(model.parameters()).dtype in MERGED
            return update_share(model, merged=merged, compact=self.compact)

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        return self.decoder.metrics()

    def close(self) -> None:
        """Do nothing."""
