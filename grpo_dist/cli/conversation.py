"""A chat with a trained model and its base model. Both answer the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..checkpoint.trained import Trained
from ..config.rollout import RolloutConfig
from ..config.schema import DataConfig
from ..data.prompts import render
from ..model.config_files import end_token_ids
from ..model.load import load_causal_lm
from ..model.peft import PeftModel
from ..model.policy import Policy
from ..rollout.sampling import sampling_with
from ..text.plain import plain_lines
from ..text.result_console import ResultConsole
from ..text.tokens import CompletionTexts

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_LINE_CHARACTERS = 10_000
_SAMPLING = ("max_completion_length", "top_p", "top_k", "min_p", "stop", "min_new_tokens", "banned_tokens")
"""The options of rollouts that hold in a chat."""


@dataclass
class Voice:
    """One of the two models."""

    name: str
    model: nn.Module
    adapters: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context manager for the model's computation."""
    said: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far, as messages."""


class Conversation:
    """The two models and their generation settings."""

    def __init__(
        self, trained: Trained, policy: Policy, tokenizer: PreTrainedTokenizerBase, temperature: float,
        longest: int | None, seed: int,
    ) -> None:  # fmt: skip
        """A temperature of 0 is greedy. Sampling uses the run's top_p, top_k and min_p. If `longest` is None,
        rollout.max_completion_length limits answers."""
        self.tokenizer = tokenizer
        self.data = DataConfig(**{**trained.config["data"], "curriculum": None})
        self.templated = bool(tokenizer.chat_template) and self.data.chat_template != "never"
        self.voices = voices(trained, policy)
        for voice in self.voices:  # generate() would use the penalties and limits of the model's own config
            voice.model.generation_config = GenerationConfig()
        torch.manual_seed(seed)
        given, end_ids = trained.config["rollout"], end_token_ids(trained.model, tokenizer)
        # a run of an older version lacks some
        rollout = RolloutConfig(**{name: given[name] for name in _SAMPLING if name in given})
        self.texts_of = CompletionTexts(tokenizer, end_ids)
        self.sampling = sampling_with(rollout, tokenizer, end_ids, policy.causal_lm.config)
        most = longest or rollout.max_completion_length
        self.generation = {"max_new_tokens": most, "min_new_tokens": min(rollout.min_new_tokens, most),
                           "suppress_tokens": [*self.sampling.banned] or None, "do_sample": temperature > 0,
                           "eos_token_id": end_ids, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        if temperature > 0:
            self.generation |= {"temperature": temperature, "top_p": rollout.top_p, "top_k": rollout.top_k,
                                "min_p": rollout.min_p}  # fmt: skip
        self.console = ResultConsole()

    def answer(self, prompt: str) -> None:
        """Print both answers: side by side as they grow on a terminal, else one after the other."""
        answers = dict.fromkeys((voice.name for voice in self.voices), "")
        if not self.console.is_terminal:
            for voice in self.voices:
                answer = plain_lines(self._generate(voice, prompt, lambda _: None), _LINE_CHARACTERS)
                print(f"--- {voice.name}\n{answer or '(ended without a text)'}", flush=True)
            return
        with Live(_side_by_side(answers), console=self.console, vertical_overflow="visible") as live:
            for voice in self.voices:

                def show(text: str, name: str = voice.name) -> None:
                    answers[name] = text
                    live.update(_side_by_side(answers))

                self._generate(voice, prompt, show)

    def _generate(self, voice: Voice, prompt: str, show: Callable[[str], None]) -> str:
        """Return the answer of a voice. `show` gets the text each time it grows."""
        messages = [*voice.said, {"role": "user", "content": prompt}]
        ids = render(messages if self.templated else prompt, self.data, self.tokenizer).ids

        def stops(row: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            answer = row[0, len(ids) :].tolist()
            return torch.tensor([self.sampling.stopped_at(answer, 0) == len(answer)])

        with voice.adapters(), torch.no_grad():
            out = voice.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                       streamer=_Shown(self.texts_of, show),
                                       stopping_criteria=StoppingCriteriaList([stops]), **self.generation)  # fmt: skip
        (text,) = self.texts_of([out[0, len(ids) :].tolist()])
        voice.said = [*messages, {"role": "assistant", "content": text}]
        return text


def voices(trained: Trained, policy: Policy) -> list[Voice]:
    """The base model and the trained model. With adapters they share weights."""
    if isinstance(policy.model, PeftModel):
        base = Voice("base", policy.causal_lm, policy.model.disable_adapter)
    else:
        base = Voice("base", load_causal_lm(trained.model, policy.causal_lm.dtype, None).eval())
    return [base, Voice(f"after {trained.step} steps", policy.causal_lm)]


class _Shown(BaseStreamer):
    """Shows an answer as it grows."""

    def __init__(self, texts_of: CompletionTexts, show: Callable[[str], None]) -> None:
        self._texts_of, self._show = texts_of, show
        self._ids: list[int] | None = None

    def put(self, value: Any) -> None:
        """Receive the prompt, which comes first, or a token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        (text,) = self._texts_of([self._ids])
        if not text.endswith("\ufffd"):  # the bytes of a character may come one by one
            self._show(text)

    def end(self) -> None:
        """Do nothing: the last token is shown already."""


def _side_by_side(answers: dict[str, str]) -> Table:
    table = Table(*answers, expand=True, show_lines=False)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(Text(plain_lines(text, _LINE_CHARACTERS)) for text in answers.values()))
    return table
