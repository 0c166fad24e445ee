"""Make a toy model: a tokenizer and a tiny Qwen2, trained from random weights on a task of toy.py or toy_carry.py.

A first phase teaches the task. A short second phase lets the model answer wrong more often and keeps the knowledge.
GRPO needs such a policy: it can be right and mostly is not. This does no reinforcement learning and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen2Tokenizer

T = TypeVar("T")
MAX_MODEL_BYTES = 1_000_000
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


class Problem(Protocol):
    """A prompt and the integer that a right completion ends with."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class Phase:
    """One phase of the supervised training."""

    name: str
    num_steps: int
    matrix_learning_rate: float  # Muon, the hidden matrices
    other_learning_rate: float  # AdamW, the embedding, the biases and the norms
    fault_share: float  # share of targets that are no right answer; each task has its own kinds of faults
    batch_size: int = 64


@dataclass(frozen=True)
class Shape:
    """The size of a decoder; all have four heads and two of keys and values."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 3


@dataclass(frozen=True)
class Bounds:
    """Accuracies on held-out problems, between 0 and 1, that a model must have to ship."""

    taught: float  # lower bound of the greedy accuracy after the first phase
    greedy: tuple[float, float]  # lower and upper bound of the greedy accuracy of the finished model
    sampled: tuple[float, float]  # lower and upper bound of the accuracy of its samples


@dataclass(frozen=True)
class Task:
    """What a model learns, and how it is evaluated."""

    texts: Sequence[str]  # the tokenizer is trained on them
    draw: Callable[[Phase, random.Random], list[tuple[str, str]]]  # a batch of prompts with their targets
    held_out: Sequence[Problem]
    max_completion_tokens: int
    phases: tuple[Phase, Phase]
    shape: Shape
    bounds: Bounds
    chat_template: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """Results of a model on a list of problems; all are shares between 0 and 1."""

    greedy: float  # problems whose most likely completion is right
    sampled: float  # samples at temperature 1 that are right
    any_sample: float  # problems with at least one right sample
    ended: float  # samples that end with the end token

    def __str__(self) -> str:
        return (
            f"greedy {self.greedy:.3f}, sampled {self.sampled:.3f}, "
            f"any sample {self.any_sample:.3f}, ended {self.ended:.3f}"
        )


def last_integer(text: str) -> int | None:
    """Return the last integer written in text, or None."""
    integers = re.findall(r"-?\d+", text)
    return int(integers[-1]) if integers else None


def write_rows(path: Path, rows: Sequence[Problem]) -> None:
    """Write problems as JSON lines of prompt and answer, shuffled in a fixed order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    lines = [json.dumps({"prompt": row.prompt, "answer": str(row.answer)}) + "\n" for row in shuffled]
    path.write_text("".join(lines), encoding="utf-8")


def distinct(draw: Callable[[int], T], count: int) -> list[T]:
    """So many different things; `draw` gets the number of those that are there."""
    things = dict[T, None]()
    while len(things) < count:
        things[draw(len(things))] = None
    return list(things)


def unseen(draw: Callable[[], T], held_out: Set[T], count: int) -> list[T]:
    """So many things, none of which is held out."""
    things: list[T] = []
    while len(things) < count:
        thing = draw()
        things += [] if thing in held_out else [thing]
    return things


def make_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Train Qwen2's byte-level BPE on some texts. Each digit is a token, and there is an end and a padding token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    # AutoTokenizer rebuilds a Qwen2 tokenizer from its vocabulary and merges, with Qwen2's pre-tokenizer. Merges that
    # were learned with another pre-tokenizer would mean something else after a save and a load.
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        unk_token=None,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=4096,
    )


def make_model(tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> Qwen2ForCausalLM:
    """Return an untrained float32 model with tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return token ids (N, T) and labels (N, T), padded on the right, and the length of the shortest prompt.

    Labels are -100 except on the completion and its end token.
    """
    import torch

    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    targets = [[*tokenizer(target)["input_ids"], tokenizer.eos_token_id] for _, target in pairs]
    width = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    ids = torch.full((len(pairs), width), int(tokenizer.pad_token_id))
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) : end] = torch.tensor(target)
    return ids, labels, min(map(len, prompts))


def cross_entropy(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, shortest: int) -> torch.Tensor:
    """Return the mean negative log-likelihood of the completion tokens; right padding needs no attention mask."""
    import torch.nn.functional as F

    # No loss needs the logits before the last token of the shortest prompt, which are a third of the output's cost.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=slice(shortest - 1, -1)).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, shortest:].flatten())


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, phase: Phase, seed: int) -> None:
    """Run one phase: Muon for the hidden matrices, AdamW for the rest; rates warm up and decay to zero."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # AdamW alone needs three times as many steps to solve held-out problems, which takes minutes more.
    optimizers = [
        torch.optim.Muon(matrices, lr=phase.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=phase.other_learning_rate, weight_decay=0.1, betas=(0.9, 0.95)),
    ]

    def factor(step: int) -> float:  # warm up over a twentieth, decay over the last six tenths
        return min(1.0, (step + 1) / (0.05 * phase.num_steps), (1 - step / phase.num_steps) / 0.6)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    draw, start = random.Random(seed), time.perf_counter()
    for step in range(1, phase.num_steps + 1):
        loss = cross_entropy(model, *encode(tokenizer, task.draw(phase, draw)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == phase.num_steps:
            seconds = time.perf_counter() - start
            print(f"{phase.name} {step}/{phase.num_steps}: loss {loss.item():.4f}, {seconds:.1f} s", flush=True)


def evaluate(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Problem],
    max_completion_tokens: int,
    seed: int = 0,
    num_samples: int = 8,
) -> Accuracy:
    """Complete every problem greedily and num_samples times at temperature 1. The last integer counts."""
    import torch

    tokenizer.padding_side = "left"
    inputs = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    limits = {"max_new_tokens": max_completion_tokens, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        greedy = model.generate(**inputs, **limits, do_sample=False)[:, width:]
        # top_k=0: transformers would otherwise cut to the 50 likeliest tokens, which is not the policy GRPO trains.
        draws = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": num_samples}
        sampled = model.generate(**inputs, **limits, **draws)[:, width:]
    ended = (sampled == tokenizer.eos_token_id).any(1).float().mean().item()
    answers = [row.answer for row in rows]
    best = [last_integer(text) for text in tokenizer.batch_decode(greedy, skip_special_tokens=True)]
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    right = [last_integer(text) == answers[index // num_samples] for index, text in enumerate(texts)]
    groups = [right[i : i + num_samples] for i in range(0, len(right), num_samples)]
    return Accuracy(
        greedy=sum(a == b for a, b in zip(best, answers, strict=True)) / len(answers),
        sampled=sum(right) / len(right),
        any_sample=sum(map(any, groups)) / len(groups),
        ended=ended,
    )


def make_base(task: Task, directory: Path, seed: int) -> list[str]:
    """Train a model, save it in bfloat16, evaluate the saved model, and return the bounds that it misses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = make_tokenizer(task.texts)
    tokenizer.chat_template = task.chat_template
    model = make_model(tokenizer, task.shape, seed)
    teaching, spoiling = task.phases
    train(model, tokenizer, task, teaching, seed)
    first = evaluate(model, tokenizer, task.held_out, task.max_completion_tokens)
    print(f"held-out after the {teaching.name} phase: {first}", flush=True)
    train(model, tokenizer, task, spoiling, seed)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    final = evaluate(saved, tokenizer, task.held_out, task.max_completion_tokens)
    weights = directory / "model.safetensors"
    weights.chmod(0o644)  # safetensors lets only the owner read it, and an installed package has other users
    size_bytes = weights.stat().st_size
    print(f"held-out of the saved model: {final}; {size_bytes} bytes", flush=True)
    bounds = {
        f"greedy after the {teaching.name} phase": (first.greedy, task.bounds.taught, 1.0),
        "greedy": (final.greedy, *task.bounds.greedy),
        "sampled": (final.sampled, *task.bounds.sampled),
        "ended": (final.ended, 0.99, 1.0),
    }
    missed = [f"{name} {value:.3f}, expected {low} to {high}"
              for name, (value, low, high) in bounds.items() if not low <= value <= high]  # fmt: skip
    too_big = [f"{size_bytes} bytes, expected below {MAX_MODEL_BYTES}"] if size_bytes >= MAX_MODEL_BYTES else []
    return missed + too_big


def main(task: Task, write_data: Callable[[Path], None], arguments: Sequence[str] | None = None) -> None:
    """Make a model, and the data files if asked. Exits with an error if the model misses a bound."""
    parser = argparse.ArgumentParser(description="Make a toy base model.", allow_abbrev=False)
    parser.add_argument("out_dir", type=Path, help="directory for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training targets")
    parser.add_argument("--data-dir", type=Path, help="also write the training and evaluation prompts here")
    options = parser.parse_args(arguments)
    if options.data_dir is not None:
        write_data(options.data_dir)
    start = time.perf_counter()
    missed = make_base(task, options.out_dir, options.seed)
    print(f"made in {time.perf_counter() - start:.1f} s")
    if missed:
        raise SystemExit(f"the model in {options.out_dir} misses its targets: {'; '.join(missed)}")
