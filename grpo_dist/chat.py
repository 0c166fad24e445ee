"""`python -m grpo_dist chat`: talk to what a run has trained, and hear its base model's answer beside it.

    python -m grpo_dist chat runs/quickstart
    python -m grpo_dist chat runs/quickstart --prompt "What is 12 - 7? Answer with an integer."

Prompts go through the tokenizer's chat template, with data.system_prompt, unless there is none or data.chat_template is
`never`; each model then remembers its own side of the conversation. Answers are the likeliest unless --temperature is
given. Ctrl-D or an empty line ends it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import TextStreamer

from .checks import require
from .config import DataConfig
from .data import render
from .display import set_up_logging
from .models import end_token_ids, load_causal_lm
from .plain_text import plain
from .policy import Policy
from .trained import Trained, find, load

_LINE_CHARACTERS = 10_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_or_checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="train.output_dir, or a "
                        "checkpoint in it")  # fmt: skip
    parser.add_argument("--prompt", help="answer this alone and end")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (rollout.max_completion_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")


@dataclass
class Voice:
    """One of the two models."""

    name: str
    model: nn.Module
    adapters: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context in which the model computes."""
    said: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far, as messages."""


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Answer one prompt, or whatever is typed. Raises ValueError, OSError."""
    require(not rest, "arguments", list(rest), "a run or a checkpoint, and the options of --help")
    require(options.temperature >= 0, "--temperature", options.temperature, "0 or more")
    require(options.max_new_tokens is None or options.max_new_tokens > 0, "--max_new_tokens", options.max_new_tokens,
            "at least 1")  # fmt: skip
    set_up_logging()
    trained = find(options.run_or_checkpoint)
    policy, tokenizer = load(trained)
    conversation = Conversation(trained, policy, tokenizer, options)
    if options.prompt is not None:
        conversation.answer(options.prompt)
        return 0
    while prompt := _typed():
        conversation.answer(prompt)
    return 0


def _typed() -> str:
    try:
        return input("you> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


class Conversation:
    """Both models, and how they are asked."""

    def __init__(self, trained: Trained, policy: Policy, tokenizer: Any, options: argparse.Namespace) -> None:
        self.tokenizer = tokenizer
        self.data = DataConfig(**{**trained.config["data"], "curriculum": None})
        self.templated = bool(tokenizer.chat_template) and self.data.chat_template != "never"
        self.voices = voices(trained, policy)
        torch.manual_seed(options.seed)
        longest = options.max_new_tokens or trained.config["rollout"]["max_completion_length"]
        self.generation = {"max_new_tokens": longest, "do_sample": options.temperature > 0,
                           "eos_token_id": end_token_ids(trained.model, tokenizer),
                           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        if options.temperature > 0:
            self.generation |= {"temperature": options.temperature, "top_p": 1.0, "top_k": 0}
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
