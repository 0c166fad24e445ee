"""The model card of a trained model: data, rewards, options, course and evaluation, from the files of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from .. import __version__
from ..config.files import as_yaml
from ..config.schema import Config
from ..config.values import flat
from ..monitoring.machine import versions
from ..text.plain import plain

Kind = Literal["merged", "adapter"]

_ROWS = 9
_COURSE = {
    "reward/mean": "reward", "kl": "KL", "entropy": "entropy", "completion/length_mean": "tokens a completion",
    "completion/truncated": "truncated", "grad_norm": "gradient norm",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ABOUT_THE_MACHINE = ("train.output_dir", "train.resume", "train.max_time", "logging.")
_SHOWN_CHARACTERS = 120


def write_card(
    directory: Path, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]], step: int, kind: Kind,
    form: str | None = None,
) -> None:  # fmt: skip
    """Write README.md into the directory of an exported model; see `model_card`."""
    (directory / "README.md").write_text(model_card(config, history, step, kind, form), encoding="utf-8")


def model_card(
    config: Mapping[str, Any], history: Sequence[Mapping[str, Any]], step: int, kind: Kind, form: str | None = None
) -> str:
    """Markdown with the front matter for the hub.

    `config` is the resolved config without secrets, `history` the lines of metrics.jsonl. Lines after `step` describe
    later states of the run and are left out. `form` is that of the checkpoint which the base was dequantised from.
    """
    history = [entry for entry in history if entry["step"] <= step]
    train, rollout = config["train"], config["rollout"]
    sections = [
        _front_matter(config, kind),
        f"# {Path(train['output_dir']).name}",
        f"`{_place(config['model']['name'])}` after {step} steps of GRPO with grpo_dist {__version__}: "
        f"{train['batch_size']} prompts a step, {rollout['group_size']} completions of at most "
        f"{rollout['max_completion_length']} tokens each"
        + (". This is only the PEFT adapter." if kind == "adapter" else ".")
        + _quantization(config, kind, form),
        "## Evaluation\n\n" + _evaluation(history),
        "## Course of the training\n\n" + _course(history),
        "## Data and rewards\n\n" + _data(config),
        "## Options\n\nOptions that differ from the defaults:\n\n```yaml\n" + _options(config) + "```",
        "## Software\n\n" + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "## Limits\n\nOnly the values above were measured. A model trained on a reward is good at what that counts. "
        "Test separately whether it keeps the abilities of the base model.",
    ]
    return "\n\n".join(sections) + "\n"


def _quantization(config: Mapping[str, Any], kind: Kind, form: str | None) -> str:
    """What the adapter belongs on, where its base was quantised."""
    quantization = config["model"].get("quantization")
    if quantization is None and form is None:
        return ""
    how = f"quantised to {quantization} by bitsandbytes" if form is None else f"dequantised from {form}"
    if config.get("lora") is None:
        return f" The model was trained from the base {how}."
    use = "belongs on that" if kind == "adapter" else "is merged into its values"
    return f" The adapter was trained on the base {how}, and {use}."


def _front_matter(config: Mapping[str, Any], kind: str) -> str:
    base, files = config["model"]["name"], config["data"]["train_file"]
    data = [name for name in ([files] if isinstance(files, str) else files) if _on_hub(name)]
    fields = {"library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "text-generation",
              "tags": ["grpo", "reinforcement-learning", "grpo_dist"]}  # fmt: skip
    fields |= {"base_model": base} if _on_hub(base) else {}
    fields |= {"datasets": data} if data else {}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _on_hub(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _place(value: Any) -> Any:
    """A name, or all names in a value, without directories of the machine."""
    if isinstance(value, Mapping):
        return {_place(key): _place(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_place(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _evaluation(history: Sequence[Mapping[str, Any]]) -> str:
    measured = [entry for entry in history if any(name.startswith("eval/") for name in entry)]
    if not measured:
        return "The training had none."
    first, last = measured[0], measured[-1]
    columns = [first] if first is last else [first, last]
    names = [name for name, value in last.items() if name.startswith("eval/") and isinstance(value, (int, float))]
    rows = [[name.removeprefix("eval/"), *(_number(entry.get(name)) for entry in columns)] for name in names]
    return _table(["held-out data", *(f"step {entry['step']}" for entry in columns)], rows)


def _course(history: Sequence[Mapping[str, Any]]) -> str:
    steps = [entry for entry in history if "reward/mean" in entry]
    if not steps:
        return "No step was recorded."
    names = [name for name in _COURSE if name in steps[-1]]
    last = len(steps) - 1
    chosen = sorted({round(last * place / (_ROWS - 1)) for place in range(_ROWS)})
    rows = [[str(steps[n]["step"]), *(_number(steps[n].get(name)) for name in names)] for n in chosen]
    return _table(["step", *(_COURSE[name] for name in names)], rows)


def _data(config: Mapping[str, Any]) -> str:
    data = config["data"]
    trained = data["train_file"]
    files = [trained] if isinstance(trained, str) else [f"{name} (weight {share:g})" for name, share in trained.items()]
    lines = [
        f"- trained on: {', '.join(f'`{_place(name)}`' for name in files)}",
        f"- evaluated on: {'`' + _place(data['eval_file']) + '`' if data['eval_file'] else 'nothing'}",
    ]
    for reward in config["rewards"]:
        given = ", ".join(f"{key}: {_place(value)}" for key, value in reward["args"].items())
        arguments = plain(given, _SHOWN_CHARACTERS)
        lines.append(f"- reward: `{reward['name']}` × {reward['weight']:g}" + (f" ({arguments})" if arguments else ""))
    return "\n".join(lines)


def _options(config: Mapping[str, Any]) -> str:
    defaults = flat(asdict(Config()))
    given = {key: value for key, value in flat(config).items()
             if (key not in defaults or value != defaults[key]) and not key.startswith(_ABOUT_THE_MACHINE)}  # fmt: skip
    return as_yaml(_place(given), width=110)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"
