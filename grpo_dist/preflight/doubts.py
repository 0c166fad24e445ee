"""What a config says about data without an error, and its user may not have meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import Config
from ..text.templates import closing_of
from ..types import Prompt

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_ESCAPE = re.compile(r"\\[nrt]")
_NOT_SHOWN = {
    "tools": "environment.tools names functions that the model may call",
    "chat_template_kwargs": "model.chat_template_kwargs sets them for all rows",
    "image": "only text is trained on",
    "images": "only text is trained on",
}
"""Columns that other trainers show to the model, with what to do here."""
_EXAMPLES = ("configs", "data")
"""The folder of the data that ships with the package."""


def doubts(
    config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], end_ids: Collection[int]
) -> list[str]:
    """One sentence for each; `config` is that by which the prompts were rendered, `end_ids` end a completion."""
    data, found = config.data, []
    if data.chat_template == "auto" and tokenizer.chat_template and len(prompts) and prompts[0].messages is None:
        found.append("prompts are plain text, and go to the model without its chat template, which a model for "
                     "conversations expects: set data.chat_template to `always`, or to `never` if they are meant so"
                     )  # fmt: skip
    if data.eval_file is not None and _ships(data.eval_file) and not any(map(_ships, data.train_files)):
        found.append(f"data.eval_file: {data.eval_file} ships with the package, and data.train_file does not: give "
                     "held-out prompts of your own task, or null")  # fmt: skip
    if len(prompts):
        found += [f"the column {name!r} is not shown to the model, only rewards get it: {advice}"
                  for name, advice in _NOT_SHOWN.items() if name in prompts[0].columns]  # fmt: skip
        if prompts[0].messages is not None and (doubt := _of_ends(config, tokenizer, end_ids)) is not None:
            found.append(doubt)
    texts = {"data.system_prompt": [data.system_prompt or ""], "rollout.stop": config.rollout.stop}
    found += [f"{option}: {text!r} has a backslash where a line break or a tab may be meant: in YAML write it in "
              "double quotes" for option, given in texts.items() for text in given if _ESCAPE.search(text)]  # fmt: skip
    return found


def _of_ends(config: Config, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> str | None:
    """A doubt about a template that ends answers with a token which ends no completion, or None."""
    closing = closing_of(tokenizer, config.data.template_date)
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    if not ids or not end_ids or ids[0] in end_ids or any(text in closing for text in config.rollout.stop):
        return None
    ends = ", ".join(repr(tokenizer.decode([number])) for number in sorted(end_ids))
    return (f"the chat template ends an answer with {closing!r}, which ends no completion (only {ends} does): what the "
            "model writes after its answer is part of the completion; add it to rollout.stop")  # fmt: skip


def _ships(file: str) -> bool:
    return Path(file).absolute().parts[-3:-1] == _EXAMPLES
