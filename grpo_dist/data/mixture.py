"""The training data of a config: one data set or a mixture, in memory or streamed, and the sampler over it."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, overload

from ..config.schema import DataConfig, TrainConfig
from ..types import Prompt
from .order import Curriculum, Mixture, Sampler
from .prompts import PromptReader, check_columns
from .rows import open_rows
from .seen import check_seen

log = logging.getLogger(__name__)

_CHECKED_ROWS = 100
_KEPT_PROMPTS = 4096  # a step asks for its prompts several times


def load_training(reader: PromptReader, train: TrainConfig) -> tuple[Sequence[Prompt], Sampler | Mixture | Curriculum]:
    """Return all training prompts (those of a mixture one data set after another) and the sampler over them.

    Raises ValueError or FileNotFoundError as `PromptReader.load` does.
    """
    data = reader.config
    parts: list[Sequence[Prompt]] = []
    first_index = 0
    evaluated: frozenset[tuple[int, ...]] = frozenset()
    if data.hold_out and data.eval_file is not None:
        held_out, _ = reader.load(data.eval_file, data.eval_split)
        evaluated = frozenset(tuple(prompt.ids) for prompt in held_out)
    for path in data.train_files:
        if data.streaming:
            part = StreamedPrompts(path, reader, first_index)
            first_index += len(part)
            parts.append(part)
        else:
            loaded, report = reader.load(path, data.train_split, first_index)
            first_index += report.num_rows
            parts.append(_without(evaluated, loaded, path) if data.hold_out else loaded)
    prompts = parts[0] if len(parts) == 1 else Joined(parts)
    sampler: Sampler | Mixture = (
        Sampler(len(prompts), train.batch_size, train.seed)
        if len(parts) == 1
        else Mixture([len(part) for part in parts], list(data.train_files.values()), train.batch_size, train.seed)
    )
    if data.curriculum is None:
        return prompts, sampler
    plan = data.curriculum
    return prompts, Curriculum(sampler, len(prompts), plan.low, plan.high, plan.rest_epochs)


def _without(evaluated: frozenset[tuple[int, ...]], prompts: list[Prompt], path: str) -> list[Prompt]:
    """The prompts whose tokens are not those of an evaluation prompt. Raises ValueError where there are none."""
    rest = [prompt for prompt in prompts if tuple(prompt.ids) not in evaluated]
    if not rest:
        raise ValueError(f"data.hold_out: data.eval_file has all {len(prompts)} prompts of {path}, expected others; "
                         "evaluate on fewer, or set it to false")  # fmt: skip
    log.info("%s: data.hold_out leaves out %d of %d prompts, which are evaluated on", path, len(prompts) - len(rest),
             len(prompts))  # fmt: skip
    return rest


def identifying(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """Yield the prompts that identify a data set: all, or of a streamed one those that are checked at its start."""
    if isinstance(prompts, Joined):
        for part in prompts.parts:
            yield from identifying(part)
    else:
        yield from prompts[:_CHECKED_ROWS] if isinstance(prompts, StreamedPrompts) else prompts


def order_of(config: DataConfig) -> dict[str, Any]:
    """Return what decides a step's prompts beside the data and the seed."""
    weights = None if isinstance(config.train_file, str) else list(config.train_file.values())
    return {"weights": weights, "curriculum": config.curriculum and asdict(config.curriculum)}


class _Prompts(Sequence[Prompt]):
    """Prompts by their place; a slice of them is a list."""

    @abstractmethod
    def _at(self, place: int) -> Prompt:
        """The prompt at a place from 0."""

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...

    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        """Return a prompt, or those of a slice; raises ValueError where a row that is read now cannot be used."""
        places = range(len(self))[place]
        return self._at(places) if isinstance(places, int) else [self._at(each) for each in places]


class StreamedPrompts(_Prompts):
    """Prompts that are read, checked and rendered when they are needed."""

    def __init__(self, path: str, reader: PromptReader, first_index: int) -> None:
        """Find the rows and check the first hundred; raises what `PromptReader.load` raises."""
        self._path, self._reader, self._first_index = path, reader, first_index
        self._rows = open_rows(path, reader.config.train_split, reader.config.subset)
        first = range(min(_CHECKED_ROWS, len(self._rows)))
        self._names = list(dict.fromkeys(name for place in first for name in self._rows[place].columns))
        if self._names:
            check_columns(path, self._names, reader.config)
        self._prompt = functools.lru_cache(_KEPT_PROMPTS)(self._read)
        check_seen(path, [self._prompt(place) for place in first], reader.config, reader.tokenizer)
        log.info("%s: %d rows; the first %d are checked, the others when they are needed", path, len(self), len(first))

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, place: int) -> Prompt:
        return self._prompt(place)

    def _read(self, place: int) -> Prompt:
        row = self._rows[place]
        names = list(dict.fromkeys((*self._names, *row.columns)))
        if len(names) > len(self._names):  # columns that none of the first rows has
            check_columns(self._path, names, self._reader.config)
        return self._reader.prompt_of(self._path, row, self._first_index + place, names)


class Joined(_Prompts):
    """Several lists of prompts as one."""

    def __init__(self, parts: Sequence[Sequence[Prompt]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _at(self, place: int) -> Prompt:
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)

    def __iter__(self) -> Iterator[Prompt]:
        for part in self.parts:
            yield from part
