"""Checks of tokenizer, prompts, gold answers and rewards. They load no weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.resume import resume_path, with_template_date
from ..checkpoint.store import DamagedCheckpoint
from ..config.schema import Config, ModelConfig, RewardConfig
from ..data.mixture import load_training
from ..data.order import Curriculum, Mixture, Sampler
from ..data.prompts import PromptReader
from ..environments.host import EnvironmentHost
from ..model.checks import require_complete_model, stored_quantization
from ..model.config_files import (
    check_model_config,
    end_token_ids,
    ignored_generation_options,
    load_model_config,
    load_tokenizer,
)
from ..model.files import model_path, require_quantizable
from ..model.headers import compare_headers
from ..model.load import attention_for, try_blank
from ..model.split_rows import require_whole_groups
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import BUILT_IN, answer_checks, declared_placement, episode_columns
from ..rewards.scores import to_items
from ..rollout.playing import by_environment, described, episodes_of, for_prompts, open_host, templated
from ..rollout.replay import require_experts
from ..rollout.sampling import sampling_with
from ..text.plain import plain
from ..types import Prompt
from .doubts import doubts
from .findings import Findings

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_SHOWN_PROMPTS = 2
_SHOWN_CHARACTERS = 400
_SCORED_PROMPTS = 8


@dataclass
class Contents:
    """What the check could read. A field is None or empty where reading failed."""

    tokenizer: PreTrainedTokenizerBase | None = None
    model_config: PreTrainedConfig | None = None
    end_ids: list[int] = field(default_factory=list)
    prompts: Sequence[Prompt] = ()
    eval_prompts: list[Prompt] = field(default_factory=list)
    shown: list[Prompt] = field(default_factory=list)
    """The first prompts, with what their environments say at a reset."""
    sampler: Sampler | Mixture | Curriculum | None = None


def read_contents(config: Config, num_ranks: int, findings: Findings, has_model: bool = True) -> Contents:
    """Read tokenizer, model config and data, and note every problem with them; without `has_model`, only the data."""
    contents = Contents()
    if has_model:
        config = _read_model(config, contents, num_ranks, findings)
    host = None
    with findings.attempt():
        host = open_host(config)
    try:
        _read_data(templated(config), contents, findings, host)
    finally:
        if host is not None:
            host.close()
    return contents


def _read_model(config: Config, contents: Contents, num_ranks: int, findings: Findings) -> Config:
    """Read tokenizer and model config. Returns the config with the date of its template."""
    unreadable = f"model.name: {config.model.name!r} given, expected a hub id or a directory that can be read: "
    with findings.attempt():
        require_complete_model(config.model.name, model_path(config.model), config.model.revision)
        with findings.attempt(unreadable):
            contents.tokenizer = load_tokenizer(config.model)
        with findings.attempt(unreadable):
            contents.model_config = load_model_config(config.model)
    if contents.tokenizer is not None and contents.model_config is not None:
        with findings.attempt():
            if left_out := try_model(config, contents.tokenizer, contents.model_config, num_ranks):
                findings.remarks.append(f"adapters: none on {left_out}")
        if not any(problem.startswith("model.name:") for problem in findings.problems):  # of which its files tell again
            with findings.attempt():
                if beside := compare_headers(config.model, contents.model_config):
                    findings.remarks.append(f"model.name: {beside}")
        with findings.attempt():
            contents.end_ids = end_token_ids(config.model, contents.tokenizer)
            sampling_with(config.rollout, contents.tokenizer, contents.end_ids, contents.model_config)
            if ignored := ignored_generation_options(config.model, config.rollout):
                findings.remarks.append(ignored)
        with suppress(ValueError, OSError, DamagedCheckpoint):  # `check_resuming` reports it
            config = with_template_date(config, contents.tokenizer, resume_path(config))
    return config


def try_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, num_ranks: int
) -> str | None:
    """Check the model of a run by its config and without its weights. Returns which layers get no adapter and why.

    Raises ValueError where it cannot be trained so.
    """
    check_model_config(model_config, tokenizer, config.max_sequence_length)
    implementation, obstacle = attention_for(config.model, model_config, config.max_sequence_length)
    require_quantizable(config, stored_quantization(model_config))
    require_experts(config.rollout, model_config)
    require_whole_groups(config, model_config, num_ranks, obstacle)
    return try_blank(config.model, config.lora, model_config, implementation)


def _read_data(config: Config, contents: Contents, findings: Findings, host: EnvironmentHost | None) -> None:
    checks: list[Any] = []
    with findings.attempt():
        checks = answer_checks(config.rewards) if config.data.answer_column else []
    data, episodes = config.data, None
    if contents.tokenizer is None:  # rows, columns and answers can be checked anyway
        toy = load_tokenizer(ModelConfig("toy"))
        toy.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
        reader = PromptReader(replace(data, too_long="drop"), toy, checks)
    else:
        reader = PromptReader(data, contents.tokenizer, checks)
        if host is not None and contents.tokenizer.chat_template:  # without one, the first prompt is refused
            with findings.attempt():
                reader = replace(reader, tokenizer=for_prompts(contents.tokenizer, host),
                                 tokenizers=by_environment(contents.tokenizer, host))  # fmt: skip
                episodes = episodes_of(config, host, contents.tokenizer, end_token_ids(config.model, reader.tokenizer))
            findings.results["tools"] = [f"{name}: {description}" for name, description in described(host)]
    before = len(findings.problems)
    for file in data.train_files:
        with findings.attempt():
            one = replace(reader, config=replace(reader.config, train_file=file))
            contents.prompts, contents.sampler = load_training(one, config.train)
    if len(data.train_files) > 1 and len(findings.problems) == before:
        contents.prompts, contents.sampler = load_training(reader, config.train)
    if data.eval_file:
        with findings.attempt():
            contents.eval_prompts, _ = reader.load(data.eval_file, data.eval_split)
    contents.shown = [contents.prompts[place] for place in range(min(_SHOWN_PROMPTS, len(contents.prompts)))]
    if episodes is not None and episodes.has_environment:
        with findings.attempt():
            contents.shown = episodes.first_prompts(contents.shown)
        with findings.attempt(f"data.eval_file ({data.eval_file}): "):
            episodes.first_prompts(contents.eval_prompts[:1])


def describe_prompts(config: Config, contents: Contents, findings: Findings) -> None:
    """Note the number of prompts, their longest length, and the text of the first ones as the model sees it."""
    if not contents.prompts or contents.tokenizer is None:
        return
    lines = [f"{len(contents.prompts)} to train on, {len(contents.eval_prompts)} to evaluate on"]
    findings.remarks += doubts(templated(config), contents.tokenizer, contents.prompts, contents.end_ids)
    if config.data.eval_file is None:
        findings.remarks.append("data.eval_file is null: nothing will show how the model does on prompts that it is "
                                "not trained on")  # fmt: skip
    if not config.data.streaming:
        longest = max(len(prompt.ids) for prompt in (*contents.prompts, *contents.shown))
        lines.append(f"the longest has {longest} tokens (data.max_prompt_length: {config.data.max_prompt_length})")
        plays = config.environment is not None and bool(config.environment.factories)
        trained = {_asked(prompt, plays) for prompt in contents.prompts}
        if common := sum(_asked(prompt, plays) in trained for prompt in contents.eval_prompts):
            findings.remarks.append(f"{common} of {len(contents.eval_prompts)} evaluation prompts are also trained on")
    lines += [f"{len(prompt.ids)} tokens: {plain(prompt.text, _SHOWN_CHARACTERS)}" for prompt in contents.shown]
    findings.results["prompts"] = lines


def _asked(prompt: Prompt, plays: bool) -> tuple[Any, ...]:
    """What a prompt asks: its tokens, and in a game, which its environment may begin differently, its row too."""
    return (*prompt.ids, repr(sorted(prompt.columns.items()))) if plays else tuple(prompt.ids)


def try_rewards(config: Config, contents: Contents, findings: Findings) -> None:
    """Score gold answers, and gold answers of other prompts, with each reward. Note failures and equal scores.

    Each reward runs in a worker of its own, as in the run. Built-in rewards that would load a model are not tried.
    """
    prompts = [contents.prompts[place] for place in range(min(_SCORED_PROMPTS, len(contents.prompts)))]
    totals, before = np.zeros(2), len(findings.problems)
    for reward in config.rewards:
        with findings.attempt():
            if reward.name in BUILT_IN and declared_placement(reward) == "gpu":
                findings.results.setdefault("rewards", []).append(f"{reward.name}: not tried, it would load its model")
            elif config.environment is not None and episode_columns(reward):
                findings.results.setdefault("rewards", []).append(f"{reward.name}: not tried, it needs an episode")
            else:
                totals += reward.weight_at(0) * _try(reward, config, prompts, contents, findings)
    all_scored = len(findings.problems) == before
    if config.data.answer_column and prompts and all_scored and totals[0] <= totals[1]:
        findings.remarks.append("no reward scores gold answers higher than answers of other prompts. That is normal "
                                "if answers are not completions; else run `python -m grpo_dist score`")  # fmt: skip


def _try(
    reward: RewardConfig, config: Config, prompts: Sequence[Prompt], contents: Contents, findings: Findings
) -> np.ndarray:
    """Return the mean scores of right and of wrong answers, (2,), with 0 for NaN. Raises ValueError, RuntimeError."""
    with ScorerPool([reward], replace(config.scoring, num_workers=1)) as pool:
        for prompt in (*prompts[:1], *contents.eval_prompts[:1]):
            pool.check_columns(prompt.columns)
        if not prompts or contents.tokenizer is None:
            return np.zeros(2)
        right = [str(prompt.columns["answer"]) if config.data.answer_column else prompt.text for prompt in prompts]
        pairs = [*zip(prompts, right, strict=True), *zip(prompts, right[1:] + right[:1], strict=True)]
        items = to_items(pairs, contents.tokenizer)
        scores = pool.score(items[:1])  # one item first: a reward that hangs then costs one time limit
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
    scored = ("gold answers", "answers of other prompts") if config.data.answer_column else ("prompts", "other prompts")
    findings.results.setdefault("rewards", []).append(
        f"{reward.name}: {_score(means[0])} for {scored[0]}, {_score(means[1])} for {scored[1]} "
        f"(means over {len(prompts)}, {scores.seconds[0]:.2f} s)"
    )
    return np.nan_to_num(means)


def _score(value: float) -> str:
    return "unscored" if np.isnan(value) else f"{value:.3g}"


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
