"""Make the toy base model: a tiny Qwen2 that knows integer arithmetic but hedges when sampled.

It trains a byte-level tokenizer and a decoder of under half a million parameters from nothing, in about a minute on
two idle CPU cores. A first phase teaches the sums of the operands 0 to 30 and their differences from 0 up, with a tenth
of the operand pairs held out; one target in ten hedges already (" I am not sure.") or guesses, so that the short second
phase, where most do, changes how often the model hedges and spares the arithmetic. What is left is what GRPO needs: a
policy whose best answer is right and whose samples are right less than half of the time.

It deliberately does no reinforcement learning, downloads nothing, and teaches nothing beyond the two prompt templates.

    python -m grpo_dist.toy OUT_DIR [--seed 0] [--data-dir configs/data]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen2Tokenizer

MAX_OPERAND = 30
MAX_COMPLETION_TOKENS = 16
MAX_MODEL_BYTES = 1_000_000
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
HEDGES = (" I am not sure.", " Hard to say.", " Let me think.", " It depends.")
GUESSES = (" Maybe {}.", " About {}.")


@dataclass(frozen=True)
class Problem:
    """One operand pair under one operation."""

    left: int
    operation: Literal["+", "-"]
    right: int

    @property
    def prompt(self) -> str:
        return f"What is {self.left} {self.operation} {self.right}? Answer with an integer."

    @property
    def answer(self) -> int:
        return self.left + self.right if self.operation == "+" else self.left - self.right


@dataclass(frozen=True)
class Phase:
    """One phase of the supervised training; hedging_share is of its targets, guess_share of its hedges."""

    name: str
    num_steps: int
    matrix_learning_rate: float  # Muon, the hidden matrices
    other_learning_rate: float  # AdamW, the embedding, the biases and the norms
    hedging_share: float = 0.0
    guess_share: float = 0.2
    batch_size: int = 64


ARITHMETIC = Phase("arithmetic", 680, matrix_learning_rate=0.01, other_learning_rate=0.01, hedging_share=0.1)
HEDGING = Phase("hedging", 60, matrix_learning_rate=0.001, other_learning_rate=0.001, hedging_share=0.56)


@dataclass(frozen=True)
class Accuracy:
    """What a model makes of a list of problems; all are shares between 0 and 1."""

    greedy: float  # problems whose most likely completion is right
    sampled: float  # samples at temperature 1 that are right
    any_sample: float  # problems with at least one right sample
    ended: float  # samples that ended by themselves

    def __str__(self) -> str:
        return (
            f"greedy {self.greedy:.3f}, sampled {self.sampled:.3f}, "
            f"any sample {self.any_sample:.3f}, ended {self.ended:.3f}"
        )


def toy_path() -> Path:
    """Return the directory of the toy model that ships with the package.

    Raises FileNotFoundError, with the command that makes the model, where it is absent.
    """
    path = Path(__file__).parent / "toy_model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"no toy model at {path}: make it with `python -m grpo_dist.toy {path}`")
    return path


def problems(split: Literal["train", "eval"]) -> list[Problem]:
    """List the sums and the differences from 0 up of a split; a held-out operand pair is held out for both."""
    operands = range(MAX_OPERAND + 1)
    pairs = [(left, right) for left in operands for right in operands]
    # Pairs on the edge of the range stay in training: a held-out 30 + 30 would ask for an extrapolation.
    inner = [pair for pair in pairs if min(pair) > 0 and max(pair) < MAX_OPERAND]
    # The split has its own fixed seed: were it the training seed, remaking the base would leak into old data files.
    held_out = set(random.Random(20).sample(inner, len(pairs) // 10))
    kept = [pair for pair in pairs if (pair in held_out) == (split == "eval")]
    sums = [Problem(left, "+", right) for left, right in kept]
    return sums + [Problem(left, "-", right) for left, right in kept if left >= right]


def last_integer(text: str) -> int | None:
    """Return the last integer written in text, or None."""
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def write_data(directory: Path) -> None:
    """Write the prompt and answer files of both splits, shuffled in a fixed order, as JSON lines."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        rows = problems(split)
        random.Random(0).shuffle(rows)
        lines = [json.dumps({"prompt": row.prompt, "answer": str(row.answer)}) + "\n" for row in rows]
        (directory / f"math_tasks_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer() -> Qwen2Tokenizer:
    """Train Qwen2's byte-level BPE on the templates: one token a digit, an end token and another for padding."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    texts = [Problem(1, "+", 2).prompt, Problem(1, "-", 2).prompt, " -1"]
    texts += [*HEDGES, *(guess.format(1) for guess in GUESSES)]
    # AutoTokenizer rebuilds a Qwen2 tokenizer from its vocabulary and merges alone, with Qwen2's own pre-tokenizer; so
    # the merges are learnt under that pre-tokenizer, or they would mean something else after a save and a load.
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        unk_token=None,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=4096,
    )


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Return an untrained float32 model that fits the size limit once stored in bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
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

    Labels are -100 everywhere but on the completion and its end token.
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

    # Logits before the last token of the shortest prompt would be thrown away, and are a third of the output's cost.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=slice(shortest - 1, -1)).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, shortest:].flatten())


def draw_target(problem: Problem, phase: Phase, draw: random.Random) -> str:
    """Draw a completion: the answer, or a hedge with no integer or a wrong one."""
    if draw.random() >= phase.hedging_share:
        return f" {problem.answer}"
    if draw.random() >= phase.guess_share:
        return draw.choice(HEDGES)
    wrong = draw.choice([n for n in range(2 * MAX_OPERAND + 1) if n != problem.answer])
    return draw.choice(GUESSES).format(wrong)


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, phase: Phase, seed: int) -> None:
    """Run one phase: Muon for the hidden matrices, AdamW for the rest, the rates warmed up and decayed to zero."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # With AdamW alone the held-out pairs come after three times as many steps, and the command would take minutes.
    optimizers = [
        torch.optim.Muon(matrices, lr=phase.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=phase.other_learning_rate, weight_decay=0.1, betas=(0.9, 0.95)),
    ]

    def factor(step: int) -> float:  # warm up over a twentieth, decay over the last six tenths
        return min(1.0, (step + 1) / (0.05 * phase.num_steps), (1 - step / phase.num_steps) / 0.6)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    rows, draw, start = problems("train"), random.Random(seed), time.perf_counter()
    for step in range(1, phase.num_steps + 1):
        batch = draw.sample(rows, phase.batch_size)
        data = encode(tokenizer, [(problem.prompt, draw_target(problem, phase, draw)) for problem in batch])
        loss = cross_entropy(model, *data)
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
    seed: int = 0,
    num_samples: int = 8,
) -> Accuracy:
    """Complete every problem greedily and num_samples times at temperature 1; right is a right last integer."""
    import torch

    tokenizer.padding_side = "left"
    inputs = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    limits = {"max_new_tokens": MAX_COMPLETION_TOKENS, "pad_token_id": tokenizer.pad_token_id}
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


def make_base(directory: Path, seed: int) -> list[str]:
    """Train the base, save it rounded to bfloat16, evaluate what was saved, and return the targets it missed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    train(model, tokenizer, ARITHMETIC, seed)
    first = evaluate(model, tokenizer, problems("eval"))
    print(f"held-out after the arithmetic phase: {first}", flush=True)
    train(model, tokenizer, HEDGING, seed)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    final = evaluate(saved, tokenizer, problems("eval"))
    weights = directory / "model.safetensors"
    weights.chmod(0o644)  # safetensors leaves it readable to its owner alone, and an installed package has others
    size_bytes = weights.stat().st_size
    print(f"held-out of the saved model: {final}; {size_bytes} bytes", flush=True)
    targets = {
        f"greedy after the arithmetic phase {first.greedy:.3f}, wanted at least 0.95": first.greedy >= 0.95,
        f"greedy {final.greedy:.3f}, wanted at least 0.90": final.greedy >= 0.90,
        f"sampled {final.sampled:.3f}, wanted 0.30 to 0.48": 0.30 <= final.sampled <= 0.48,
        f"ended {final.ended:.3f}, wanted at least 0.99": final.ended >= 0.99,
        f"{size_bytes} bytes, wanted below {MAX_MODEL_BYTES}": size_bytes < MAX_MODEL_BYTES,
    }
    return [message for message, met in targets.items() if not met]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the base model, and the data files where asked; exit with an error where it misses its targets."""
    parser = argparse.ArgumentParser(prog="python -m grpo_dist.toy", description="Make the toy base model.")
    parser.add_argument("out_dir", type=Path, help="directory for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the hedges")
    parser.add_argument(
        "--data-dir", type=Path, help="also write math_tasks_train.jsonl and math_tasks_eval.jsonl here"
    )
    options = parser.parse_args(arguments)
    if options.data_dir is not None:
        write_data(options.data_dir)
    start = time.perf_counter()
    missed = make_base(options.out_dir, options.seed)
    print(f"made in {time.perf_counter() - start:.1f} s")
    if missed:
        raise SystemExit(f"the model in {options.out_dir} misses its targets: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
