"""A trained model and its base model, asked the same and heard side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import TextStreamer

from .config import DataConfig
from .data import render
from .models import end_token_ids, load_causal_lm
from .plain_text import plain
from .policy import Policy
from .trained import Trained

_LINE_CHARACTERS = 10_000


@dataclass
class Voice:
    """One of the two models."""

    name: str
    model: nn.Module
    adapters: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context in which the model computes."""
    said: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far, as messages."""


class Conversation:
    """Both models, and how they are asked."""

    def __init__(self, trained: Trained, policy: Policy, tokenizer: Any, temperature: float, longest: int | None,
                 seed: int) -> None:  # fmt: skip
        """A temperature of 0 takes the likeliest token; `longest` None is rollout.max_completion_length."""
        self.tokenizer = tokenizer
        self.data = DataConfig(**{**trained.config["data"], "curriculum": None})
        self.templated = bool(tokenizer.chat_template) and self.data.chat_template != "never"
        self.voices = voices(trained, policy)
        torch.manual_seed(seed)
        self.generation = {"max_new_tokens": longest or trained.config["rollout"]["max_completion_length"],
                           "do_sample": temperature > 0,
                           "eos_token_id": end_token_ids(trained.model, tokenizer),
                           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        if temperature > 0:
            self.generation |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
        self.console = Console()

    def answer(self, prompt: str) -> None:
        """Print both answers: side by side and as they come on a terminal, else one after the other."""
        answers = dict.fromkeys((voice.name for voice in self.voices), "")
        if not self.console.is_terminal:
            for voice in self.voices:
                print(f"--- {voice.name}\n{harmless(self._generate(voice, prompt, lambda _: None))}", flush=True)
            return
        with Live(_side_by_side(answers), console=self.console, vertical_overflow="visible") as live:
            for voice in self.voices:

                def show(text: str, name: str = voice.name) -> None:
                    answers[name] += text
                    live.update(_side_by_side(answers))

                self._generate(voice, prompt, show)

    def _generate(self, voice: Voice, prompt: str, show: Callable[[str], None]) -> str:
        """A voice's whole answer, handed to `show` in pieces as it comes."""
        messages = [*voice.said, {"role": "user", "content": prompt}]
        ids = render(messages if self.templated else prompt, self.data, self.tokenizer).ids
        with voice.adapters(), torch.no_grad():
            out = voice.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                       streamer=_Pieces(self.tokenizer, show), **self.generation)  # fmt: skip
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        voice.said = [*messages, {"role": "assistant", "content": text}]
        return text


def voices(trained: Trained, policy: Policy) -> list[Voice]:
    """The base model and the trained one; with adapters they share their weights."""
    if isinstance(policy.model, PeftModel):
        base = Voice("base", policy.causal_lm, policy.model.disable_adapter)
    else:
        base = Voice("base", load_causal_lm(trained.model, policy.causal_lm.dtype, None).eval())
    return [base, Voice(f"after {trained.step} steps", policy.causal_lm)]


class _Pieces(TextStreamer):
    """Hands on what is generated, a word at a time."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def harmless(text: str) -> str:
    """A text of several lines without anything that steers a terminal."""
    return "\n".join(plain(line, _LINE_CHARACTERS) for line in text.splitlines())


def _side_by_side(answers: dict[str, str]) -> Table:
    table = Table(*answers, expand=True, show_lines=False)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(Text(harmless(text)) for text in answers.values()))
    return table
