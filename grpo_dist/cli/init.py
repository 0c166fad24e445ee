"""`python -m grpo_dist init`: write a commented config to start from, after a few questions or from options.

    python -m grpo_dist init own.yaml
    python -m grpo_dist init own.yaml --model Qwen/Qwen2.5-0.5B-Instruct --data my.jsonl --reward my_module:reward

On a terminal, `init` asks for what is not given. Elsewhere it uses defaults, and fails where an option has none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config.checks import did_you_mean
from ..config.files import as_yaml
from ..config.names import group_type, option_types
from ..config.schema import Config, RewardConfig
from ..config.shipped import shipped
from ..config.values import descriptions, flat
from ..data.rows import open_rows
from ..model.files import shapes_of, weight_files
from ..model.toy import MODELS, toy_path
from ..rewards.registry import BUILT_IN
from ..text.files import near_paths

SET = (
    "model.name", "lora.r", "lora.alpha", "data.train_file", "data.eval_file", "data.prompt_column",
    "data.answer_column", "data.chat_template", "data.max_prompt_length", "rollout.group_size",
    "rollout.max_completion_length", "optim.learning_rate", "train.batch_size", "train.num_train_steps",
    "train.max_tokens_per_pack", "train.output_dir",
)  # fmt: skip
"""Options that a starter config sets."""
OFTEN_CHANGED = (
    "model.gradient_checkpointing", "data.system_prompt", "data.bad_rows", "rollout.temperature",
    "scoring.num_workers", "loss.kl_coeff", "optim.warmup_steps", "train.eval_every", "train.save_every",
    "train.max_time", "logging.trackers",
)  # fmt: skip
"""Options that it shows in comments, with their defaults."""
PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "messages", "input", "query")
ANSWER_COLUMNS = ("answer", "solution", "target", "label", "output", "response")
RATES = {50e6: 1e-3, 500e6: 1e-4, 3e9: 2e-5, math.inf: 1e-5}
"""Learning rates for adapters, by the number of parameters below which they are suggested. The toy and SmolLM2-135M
learn with theirs; recipes for GRPO with adapters on models of billions have 5e-6 to 2e-5."""
_WIDTH = 110


@dataclass(frozen=True)
class Starter:
    """The answers that a starter config is made from."""

    model: str
    data: str
    eval_data: str | None
    prompt_column: str
    answer_column: str | None
    reward: str
    output_dir: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--model", help="hub id or directory of a causal language model, or `toy`")
    parser.add_argument("--data", help="prompts: a JSONL, JSON, CSV or parquet file, a directory, or a hub id")
    parser.add_argument("--eval_data", help="the same for evaluation (none)")
    parser.add_argument("--prompt_column", help="prompt column (guessed from local data)")
    parser.add_argument("--answer_column", help="gold answer column, `null` for none (guessed from local data)")
    parser.add_argument("--reward", help="a built-in reward, or module:function (math, where there are gold answers)")
    parser.add_argument("--output_dir", help="output directory of the run (runs/ and the name of FILE)")
    parser.add_argument("--gpus", type=int, help="GPUs for the printed training command (1)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Ask, write the file, and print the next commands. Raises ValueError, FileExistsError."""
    if rest:
        raise ValueError(f"{' '.join(rest)} given, expected the options that `init --help` lists")
    if options.file.exists():
        raise FileExistsError(f"{options.file} already exists; choose another name, or move the file")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        starter = complete(options, _ask if on_terminal else _refuse)
    except (EOFError, KeyboardInterrupt):
        raise ValueError(f"no answer; {options.file} was not written") from None
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(render(starter), encoding="utf-8")
    gold = f"gold answers of column {starter.answer_column!r}" if starter.answer_column else "no gold answers"
    print(
        f"wrote {options.file}, with prompts of column {starter.prompt_column!r} and {gold}; "
        f"the reward is {starter.reward}."
    )
    print("Now check it, and then run it:\n")
    print(f"    python -m grpo_dist check --config {options.file}")
    print(f"    {start_command(options.file, options.gpus)}")
    return 0


Check = Callable[[str], str | None]
"""Maps an answer to its problem, or to None."""
Asker = Callable[[str, str, str | None, Check], str]
"""Maps an option, a question, a default (None: no default) and a check to an answer."""


def _ask(option: str, question: str, default: str | None, check: Check) -> str:
    shown = f" [{default}]" if default is not None else ""
    while True:
        answer = input(f"{question}{shown}: ").strip() or default
        problem = check(answer) if answer else None
        if answer and not problem:
            return answer
        if problem:
            print(problem)


def _refuse(option: str, question: str, default: str | None, check: Check) -> str:
    if default is None:
        raise ValueError(f"--{option} is missing, and there is no terminal to ask on. {question}?")
    return default


def complete(options: argparse.Namespace, ask: Asker) -> Starter:
    """Return the answers from options, or from `ask`. Raises ValueError, FileNotFoundError."""

    def answer(option: str, question: str, default: str | None, check: Check = lambda _: None) -> str:
        given = getattr(options, option)
        problem = check(given) if given else None
        if problem:
            raise ValueError(f"--{option}: {problem}")
        return given or ask(option, question, default, check)

    model = answer("model", "Model, a hub id or a directory", None)
    data = answer("data", "Prompts, a JSONL, CSV or parquet file, a directory or a hub id", None, _data_problem)
    held_out = answer("eval_data", "Held-out prompts for evaluation, null for none", "null", _data_problem)
    columns = _columns(data)

    def column_problem(name: str) -> str | None:
        if not columns or name in (*columns, "null"):
            return None
        return f"{name!r} given, expected a column of {data}: {', '.join(columns)}{did_you_mean(name, columns)}"

    prompt = answer("prompt_column", f"Column with the prompt{_of(columns)}",
                    _first(PROMPT_COLUMNS, columns, "prompt"), column_problem)  # fmt: skip
    gold = answer("answer_column", f"Column with the gold answer, null for none{_of(columns)}",
                  _first(ANSWER_COLUMNS, columns, "null" if columns else "answer"), column_problem)  # fmt: skip
    reward = answer("reward", f"Reward, module:function or one of {', '.join(BUILT_IN)}",
                    "math" if gold != "null" else None, _reward_problem)  # fmt: skip
    output_dir = options.output_dir or f"runs/{options.file.stem}"
    return Starter(model, data, None if held_out == "null" else held_out, prompt, None if gold == "null" else gold,
                   reward, output_dir)  # fmt: skip


def _columns(data: str) -> list[str]:
    """The columns of local data; none for what is on the hub. Raises ValueError for a file that cannot be read."""
    if not Path(data).exists():
        return []
    try:
        return list(open_rows(data, "train")[0].columns)
    except ValueError:
        if Path(data).is_dir():  # it may have no split of this name: `check` says which it has
            return []
        raise


def _data_problem(data: str) -> str | None:
    looks_like_a_file = Path(data).suffix in (".jsonl", ".json", ".csv", ".parquet")
    return f"no file {data!r} here{near_paths(data)}" if looks_like_a_file and not Path(data).is_file() else None


def _reward_problem(reward: str) -> str | None:
    if ":" in reward or reward in BUILT_IN:
        return None
    return (f"{reward!r} given, expected module:function or one of {', '.join(BUILT_IN)}"
            f"{did_you_mean(reward, BUILT_IN)}")  # fmt: skip


def _of(columns: Sequence[str]) -> str:
    return f" (columns: {', '.join(columns)})" if columns else ""


def _first(names: Sequence[str], columns: Sequence[str], default: str) -> str:
    return next((name for name in names if name in columns), default)


def render(starter: Starter) -> str:
    """Return the config as YAML with comments."""
    config = Config(rewards=[RewardConfig(starter.reward)])
    config.model.name, config.train.output_dir = starter.model, starter.output_dir
    config.data = replace(config.data, train_file=starter.data, eval_file=starter.eval_data,
                          prompt_column=starter.prompt_column, answer_column=starter.answer_column,
                          chat_template="always" if _has_template(starter.model) else "auto")  # fmt: skip
    config.optim.learning_rate, reason = suggested_rate(starter.model)
    values, docs = flat(asdict(config)), option_docs()
    docs["optim.learning_rate"] = reason
    lines = ["# A starter config. All options, with their defaults and meanings:",
             "#     python -m grpo_dist.train --help"]  # fmt: skip
    for group in option_types():
        keys = [key for key in (*SET, *OFTEN_CHANGED) if key.partition(".")[0] == group]
        if group == "rewards":
            lines += ["", "rewards:", *_comment(docs["rewards"], "  "), *_comment(docs["rewards.name"], "  "),
                      f"  - name: {_yaml(starter.reward)}", *_comment(docs["rewards.weight"], "    "),
                      "    weight: 1.0"]  # fmt: skip
        elif keys:
            lines += ["", f"{group}:" if set(keys) & set(SET) else f"# {group}:"]
        for key in keys:
            off = "" if key in SET else "# "
            lines += [*_comment(docs[key], "  "), f"  {off}{key.partition('.')[2]}: {_yaml(values[key])}"]
    return "\n".join(lines) + "\n"


def suggested_rate(model: str) -> tuple[float, str]:
    """A learning rate to begin with, and why."""
    size = parameters_of(model)
    known = math.inf if size is None else size
    rate = next(rate for most, rate in RATES.items() if known < most or most == math.inf)
    of_size = "a model whose size is not known here" if size is None else f"{size / 1e6:,.4g} M parameters"
    return rate, (f"Peak learning rate: {rate:g} to begin with, for adapters on {of_size}. 1e-3 suits a model of a "
                  "million parameters, 1e-4 one of a hundred million, 2e-5 one of a billion, and 1e-5 larger ones. "
                  "Rewards that do not move in 50 steps ask for three times as much, rewards that fall for a third. To "
                  "train all weights (`lora: null`) takes a tenth.")  # fmt: skip


def parameters_of(model: str) -> float | None:
    """The parameters of a local model, by its files, or of another, by its name; None where the name does not say."""
    directory = _directory(model)
    if directory.is_dir() and (shapes := shapes_of(weight_files(directory))):
        return sum(map(math.prod, shapes.values()))
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?![a-z])", model, re.IGNORECASE)
    return float(named[1]) * {"B": 1e9, "M": 1e6}[named[2].upper()] if named else None


def _directory(model: str) -> Path:
    """Where a local model lies; for one of the hub, most often no directory."""
    return toy_path(model) if model in MODELS else Path(model)


def _has_template(model: str) -> bool:
    """Whether a local model has a chat template; the hub is not asked, and `check` looks again."""
    directory = _directory(model)
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def option_docs(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Return the description of every option by its dotted name, and of a reward's options by `rewards.NAME`."""
    docs = {f"{prefix}{name}": text for name, text in descriptions(cls).items()}
    types = option_types(cls)
    for name, hint in types.items():
        group = RewardConfig if name == "rewards" else group_type(hint)
        if group is not None and "." not in name:
            docs |= option_docs(group, f"{prefix}{name}.")
    return docs


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _yaml(value: Any) -> str:
    return as_yaml(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def start_command(file: Path, gpus: int | None) -> str:
    """Return the command that trains on `gpus` GPUs."""
    if gpus is None or gpus < 2:
        return f"python -m grpo_dist.train --config {file}"
    strategy = shipped("accelerate_configs") / "zero2.yaml"
    if strategy.is_relative_to(Path.cwd()):
        strategy = strategy.relative_to(Path.cwd())
    return f"accelerate launch --config_file {strategy} --num_processes {gpus} -m grpo_dist.train --config {file}"
