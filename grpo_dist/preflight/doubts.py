"""What a config says about data without an error, and its user may not have meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config.schema import Config, DataConfig
from ..types import Prompt

_EXAMPLES = ("configs", "data")
"""The folder of the data that ships with the package."""


def doubts(config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    """One sentence for each; `config` is that by which the prompts were rendered."""
    data, found = config.data, []
    if data.chat_template == "auto" and tokenizer.chat_template and len(prompts) and prompts[0].messages is None:
        found.append("prompts are plain text, and go to the model without its chat template, which a model for "
                     "conversations expects: set data.chat_template to `always`, or to `never` if they are meant so"
                     )  # fmt: skip
    if data.eval_file is not None and _ships(data.eval_file) and not any(map(_ships, _trained(data))):
        found.append(f"data.eval_file: {data.eval_file} ships with the package, and data.train_file does not: give "
                     "held-out prompts of your own task, or null")  # fmt: skip
    return found


def _trained(data: DataConfig) -> list[str]:
    return [data.train_file] if isinstance(data.train_file, str) else list(data.train_file)


def _ships(file: str) -> bool:
    return Path(file).absolute().parts[-3:-1] == _EXAMPLES
