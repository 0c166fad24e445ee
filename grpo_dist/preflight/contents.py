"""A look at what a run would learn from: tokenizer, prompts, gold answers, rewards. No weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..checkpoint.resume import resume_path, with_template_date
from ..checkpoint.store import DamagedCheckpoint
from ..config.schema import Config, ModelConfig, RewardConfig
from ..data.mixture import load_training
from ..data.prompts import load_prompts
from ..model.checks import require_whole_model
from ..model.load import attention_for, check_model_config, load_model_config, load_tokenizer, model_path, try_blank
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import BUILT_IN, answer_checks, declared_placement
from ..rewards.scores import to_items
from ..text.plain import plain
from ..types import Prompt
from .findings import Findings

_SHOWN_PROMPTS = 2
_SHOWN_CHARACTERS = 400
_SCORED_PROMPTS = 8


@dataclass
class Contents:
    """What could be read; None or empty where it could not."""

    tokenizer: Any = None
    model_config: Any = None
    prompts: Sequence[Prompt] = ()
    eval_prompts: list[Prompt] = field(default_factory=list)
    sampler: Any = None


def read_contents(config: Config, findings: Findings) -> Contents:
    """Read tokenizer, model config and data, and note everything that is wrong with them."""
    found = Contents()
    unreadable = f"model.name: {config.model.name!r} given, expected a hub id or a directory that can be read: "
    with findings.attempt():
        require_whole_model(config.model.name, model_path(config.model), config.model.revision)
        with findings.attempt(unreadable):
            found.tokenizer = load_tokenizer(config.model)
        with findings.attempt(unreadable):
            found.model_config = load_model_config(config.model)
    if found.tokenizer is not None and found.model_config is not None:
        with findings.attempt():
            check_model_config(found.model_config, found.tokenizer, config.max_sequence_length)
            implementation, _ = attention_for(config.model, found.model_config, config.max_sequence_length)
            if left_out := try_blank(config.model, config.lora, found.model_config, implementation):
                findings.remarks.append(f"adapters: none on {left_out}")
        with suppress(ValueError, OSError, DamagedCheckpoint):  # `look_at_resuming` says so
            config = with_template_date(config, found.tokenizer, resume_path(config))
    _read_data(config, found, findings)
    return found


def _read_data(config: Config, found: Contents, findings: Findings) -> None:
    checks: list[Any] = []
    with findings.attempt():
        checks = answer_checks(config.rewards) if config.data.answer_column else []
    tokenizer, data = found.tokenizer, config.data
    if tokenizer is None:  # rows, columns and answers can be looked at all the same
        tokenizer = load_tokenizer(ModelConfig("toy"))
        tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
        data = replace(data, too_long="drop")
    files = [data.train_file] if isinstance(data.train_file, str) else list(data.train_file)
    before = len(findings.problems)
    for file in files:
        with findings.attempt():
            one = replace(config, data=replace(data, train_file=file))
            found.prompts, found.sampler = load_training(one, tokenizer, checks)
    if len(files) > 1 and len(findings.problems) == before:
        found.prompts, found.sampler = load_training(config, tokenizer, checks)
    if data.eval_file:
        with findings.attempt():
            found.eval_prompts, _ = load_prompts(data.eval_file, data.eval_split, data, tokenizer, checks)


def describe_prompts(config: Config, found: Contents, findings: Findings) -> None:
    """Note how many prompts there are, how long, and what the first of them look like to the model."""
    if not found.prompts or found.tokenizer is None:
        return
    shown = [found.prompts[place] for place in range(min(_SHOWN_PROMPTS, len(found.prompts)))]
    lines = [f"{len(found.prompts)} to train on, {len(found.eval_prompts)} to evaluate on"]
    if not config.data.streaming:
        longest = max(len(prompt.ids) for prompt in found.prompts)
        lines.append(f"the longest has {longest} tokens (data.max_prompt_length: {config.data.max_prompt_length})")
        trained = {tuple(prompt.ids) for prompt in found.prompts}
        if common := sum(tuple(prompt.ids) in trained for prompt in found.eval_prompts):
            findings.remarks.append(f"{common} of {len(found.eval_prompts)} evaluation prompts are trained on as well")
    lines += [f"{len(prompt.ids)} tokens: {plain(prompt.text, _SHOWN_CHARACTERS)}" for prompt in shown]
    findings.facts["prompts"] = lines


def try_rewards(config: Config, found: Contents, findings: Findings) -> None:
    """Have each reward score gold answers, and gold answers of other prompts; note what fails and what it cannot tell.

    Each runs in a worker of its own, as in the run. Built-in rewards that would load a model are not tried.
    """
    prompts = [found.prompts[place] for place in range(min(_SCORED_PROMPTS, len(found.prompts)))]
    totals = np.zeros(2)
    for reward in config.rewards:
        with findings.attempt():
            if reward.name in BUILT_IN and declared_placement(reward) == "gpu":
                findings.facts.setdefault("rewards", []).append(f"{reward.name}: not tried, it would load its model")
            else:
                totals += reward.weight_at(0) * _try(reward, config, prompts, found, findings)
    if config.data.answer_column and prompts and totals[0] <= totals[1]:
        findings.remarks.append("no reward likes gold answers better than those of other prompts; unless an answer is "
                                "no completion here, look at some with `python -m grpo_dist score`")  # fmt: skip


def _try(
    reward: RewardConfig, config: Config, prompts: Sequence[Prompt], found: Contents, findings: Findings
) -> np.ndarray:
    """Return a reward's means over right and wrong answers, (2,), 0 for NaN. Raises ValueError, RuntimeError."""
    with ScorerPool([reward], replace(config.scoring, num_workers=1)) as pool:
        for prompt in (*prompts[:1], *found.eval_prompts[:1]):
            pool.check_columns(prompt.columns)
        if not prompts or found.tokenizer is None:
            return np.zeros(2)
        right = [str(prompt.columns["answer"]) if config.data.answer_column else prompt.text for prompt in prompts]
        pairs = [*zip(prompts, right, strict=True), *zip(prompts, right[1:] + right[:1], strict=True)]
        items = to_items(pairs, found.tokenizer)
        scores = pool.score(items[:1])  # first alone, so that a reward that hangs costs one time limit
        if not {failure.kind for failure in scores.failures} & {"timeout", "died"}:
            scores = pool.score(items, groups=[*range(len(prompts))] * 2)
    if scores.failures:
        first = scores.failures[0]
        findings.problems.append(
            f"rewards: {reward.name!r} failed on {len(scores.failures)} of {len(scores.values)} completions, first on "
            f"{plain(pairs[first.item][1], 60)!r} ({first.kind}): {plain(first.message, 300)}; see all with "
            "`python -m grpo_dist score`"
        )  # fmt: skip
        return np.zeros(2)
    means = np.array([_mean(scores.values[: len(prompts), 0]), _mean(scores.values[len(prompts) :, 0])])
    told = ("gold answers", "answers of other prompts") if config.data.answer_column else ("prompts", "other prompts")
    findings.facts.setdefault("rewards", []).append(
        f"{reward.name}: {_told(means[0])} for {told[0]}, {_told(means[1])} for {told[1]} "
        f"(means over {len(prompts)}, {scores.seconds[0]:.2f} s)"
    )
    return np.nan_to_num(means)


def _told(value: float) -> str:
    return "unscored" if np.isnan(value) else f"{value:.3g}"


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
