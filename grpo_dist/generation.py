"""Completions and their scores at once: a group is handed to the scorer when its last completion has ended, while the
engine goes on with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from .batch import Completion, Prompt
from .hashing import stream_key
from .rewards.pending import Pending
from .rewards.pool import ScorerPool
from .rewards.registry import TrainerState
from .rewards.scores import Item
from .rollout import Engine, Request, Sampling


def requests_of(prompts: list[Prompt], group_size: int, share: Callable[[int], slice], *stream: int | str,
                first: int = 0) -> list[Request]:  # fmt: skip
    """One rank's requests for `group_size` completions of each prompt.

    `share(n)` is the rank's part of n completions; `stream` names the noise, in which prompts are counted from `first`.
    """
    tasks = [(slot, sample) for slot in range(len(prompts)) for sample in range(group_size)]
    return [Request(slot, sample, prompts[slot].ids, stream_key(*stream, first + slot, sample))
            for slot, sample in tasks[share(len(tasks))]]  # fmt: skip


def generate_and_score(
    engine: Engine, model: nn.Module, requests: list[Request], prompts: list[Prompt], sampling: Sampling,
    scorer: ScorerPool, tokenizer: Any, state: TrainerState | None = None, check: Callable[[], None] | None = None,
) -> tuple[list[Completion], Pending]:  # fmt: skip
    """The requests' completions, in their order, and the scores of these on their way.

    `check` is called between tokens and may raise to give up.
    """
    columns = list(dict.fromkeys(name for request in requests for name in prompts[request.slot].columns))
    pending = scorer.open(len(requests), columns, state)
    place = {(request.slot, request.sample): n for n, request in enumerate(requests)}
    missing = Counter(request.slot for request in requests)
    ended: dict[int, list[Completion]] = {}

    def on_finish(completions: list[Completion]) -> None:
        for completion in completions:
            group = ended.setdefault(completion.slot, [])
            group.append(completion)
            if len(group) == missing[completion.slot]:  # a reward that gets many at once finds a group together
                prompt, group = prompts[completion.slot], sorted(group, key=lambda each: each.sample)
                texts = tokenizer.batch_decode([each.ids for each in group], skip_special_tokens=True)
                scorer.add(pending, {
                    place[each.slot, each.sample]: Item(prompt.messages or prompt.text, text, each.ids, prompt.columns)
                    for each, text in zip(group, texts, strict=True)
                })  # fmt: skip

    return engine.generate(model, requests, sampling, on_finish, check), pending
