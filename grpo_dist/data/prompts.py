"""Prompts: read from files or data sets, checked row by row, rendered to tokens.

This module reports every error in the data with its file and line, before any model is loaded. It drops rows only where
the config says so, and counts them. order.py decides which prompts a step takes.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ..config.environment import ENVIRONMENT_COLUMN
from ..config.schema import DataConfig
from ..rewards.registry import KEYWORDS
from ..text.messages import as_templates_expect, meant_role
from ..text.templates import Messages, TemplateRefusal, render_messages, template_of
from ..text.tokens import begun_once, tokens_around
from ..types import Prompt
from .keep import rows_to_keep
from .rows import Row, is_lines, list_columns, load_rows
from .seen import check_seen

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

AnswerCheck = Callable[[object], None]
Tokenizers: TypeAlias = "Mapping[str, PreTrainedTokenizerBase]"
"""Tokenizers by the name of an environment: the template of each knows the tools of its own."""

_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*[\"'](role|content)[\"']\s*:")
_SHOWN_ROWS = 5
_SHOWN_START = 40
_ROWS_AT_ONCE = 1024  # texts in one call of the tokenizer: fast tokenizers work on them in parallel


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model sees it."""

    text: str
    """The text, chat template included."""
    messages: Messages | None
    """The conversation it was rendered from; None for plain text."""
    ids: list[int]
    """Its token ids."""


@dataclass(frozen=True)
class DropReport:
    """The rows that were left out, and why."""

    source: str
    """File or data set."""
    unit: str
    """The unit of row numbers: `line` or `row`."""
    num_rows: int
    """Rows read."""
    dropped: list[tuple[int, str]]
    """Number and reason of each row left out."""

    def __str__(self) -> str:
        """Name the first rows and say how many there are."""
        shown = "; ".join(f"{self.unit} {number}: {reason}" for number, reason in self.dropped[:_SHOWN_ROWS])
        more = len(self.dropped) - _SHOWN_ROWS
        rest = f"; and {more} more" if more > 0 else ""
        return f"{self.source}: {len(self.dropped)} of {self.num_rows} rows cannot be used: {shown}{rest}"


@dataclass(frozen=True)
class PromptReader:
    """Makes prompts of the rows of files and data sets."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    """Renders and encodes the prompts."""
    check_answers: Sequence[AnswerCheck] = ()
    """Called with each row's gold answer; each raises ValueError for one that it cannot read."""
    tokenizers: Tokenizers = field(default_factory=dict)
    """Render the rows of several environments, by the column `environment`."""

    def load(self, path: str, split: str, first_index: int = 0) -> tuple[list[Prompt], DropReport]:
        """Read, check and render all prompts of a file or data set.

        A prompt's `index` is `first_index` plus its row's place; dropped rows count. Raises ValueError or
        FileNotFoundError where there is nothing to read, where a configured column is missing, where no row is left,
        and where a row cannot be used unless `config.bad_rows` is `drop`.
        """
        config = self.config
        rows = load_rows(path, split, config.subset)
        names = list(dict.fromkeys(name for row in rows for name in row.columns))
        if names:
            check_columns(path, names, config)
        problems: dict[int, str] = {}
        usable: list[tuple[int, str, Messages | None]] = []
        kept = rows_to_keep(path, rows, names, config.keep)
        for place, row in enumerate(rows):
            if not kept[place]:
                continue
            try:
                usable.append((place, *self._read(row)))
            except _UnusableRowError as error:
                problems[place] = str(error)
        prompts = []
        num_too_long = 0
        for place, rendered in _tokenise(usable, self.tokenizer):
            too_long = len(rendered.ids) > config.max_prompt_length
            num_too_long += too_long
            if not rendered.ids or (too_long and config.too_long == "bad_row"):
                problems[place] = _wrong_length(rendered, config)
            elif not too_long or config.too_long == "truncate":
                prompts.append(self._prompt(first_index + place, rows[place], names, rendered))
        if num_too_long and config.too_long != "bad_row":
            log.warning(
                "%s: %d of %d prompts have more than data.max_prompt_length = %d tokens (data.too_long: %s)",
                path, num_too_long, len(rows), config.max_prompt_length, config.too_long,
            )  # fmt: skip
        report = self._report(path, rows, problems, is_empty=not prompts)
        if not prompts:
            raise ValueError(f"{path}: data.keep and data.too_long leave none of {len(rows)} rows; loosen them")
        check_seen(path, prompts, config, self.tokenizer)
        return prompts, report

    def _report(self, path: str, rows: Sequence[Row], problems: Mapping[int, str], is_empty: bool) -> DropReport:
        """Tell of the rows at the places of `problems`. Raises ValueError where they may not be left out, or where that
        `is_empty`."""
        dropped = [(rows[place].number, problems[place]) for place in sorted(problems)]
        report = DropReport(path, "line" if is_lines(path) else "row", len(rows), dropped)
        if dropped and (self.config.bad_rows == "error" or is_empty):
            advice = "No row is left" if self.config.bad_rows == "drop" else "Correct them, or set data.bad_rows: drop"
            raise ValueError(f"{report}. {advice}")
        if dropped:
            log.warning("%s. Left out (data.bad_rows: drop)", report)
        return report

    def prompt_of(self, path: str, row: Row, index: int, names: Sequence[str]) -> Prompt:
        """Check and render one row of a data set as `load` does; raises ValueError where it cannot be used."""
        config = self.config
        try:
            text, messages = self._read(row)
            ((_, rendered),) = _tokenise([(0, text, messages)], self.tokenizer)
            if not rendered.ids or (len(rendered.ids) > config.max_prompt_length and config.too_long != "truncate"):
                raise _UnusableRowError(_wrong_length(rendered, config))
        except _UnusableRowError as error:
            raise ValueError(f"{path}: row {row.number} cannot be used: {error}") from error
        return self._prompt(index, row, names, rendered)

    def _prompt(self, index: int, row: Row, names: Sequence[str], rendered: Rendered) -> Prompt:
        """Its columns are all but the prompt, None where the row lacks one; its tokens the last ones that fit, after a
        BOS."""
        columns = {name: row.columns.get(name) for name in names if name != self.config.prompt_column}
        if self.config.answer_column is not None:
            columns["answer"] = row.columns[self.config.answer_column]
        ids = _last(rendered.ids, self.config.max_prompt_length, self.tokenizer.bos_token_id)
        return Prompt(index, ids, rendered.text, rendered.messages, columns)

    def _read(self, row: Row) -> tuple[str, Messages | None]:
        """Return a row's prompt as text, and as messages where it is a conversation; raises _UnusableRowError."""
        config = self.config
        if row.problem:
            raise _UnusableRowError(row.problem)
        prompt = row.columns.get(config.prompt_column) if config.prompt_column else None
        if prompt is None and config.prompt_column and not self.tokenizers:
            raise _UnusableRowError(f"no {config.prompt_column!r}")
        if prompt is None:  # the row's environment says it at its reset
            prompt = [{"role": "user", "content": ""}]
        text, messages = _as_text(prompt, config, self._tokenizer_of(row), is_filled=row.is_filled)
        if config.answer_column is not None:
            answer = row.columns.get(config.answer_column)
            if answer is None or (isinstance(answer, float) and math.isnan(answer)):  # tables write a missing number so
                raise _UnusableRowError(f"no {config.answer_column!r}")
            for check in self.check_answers:
                try:
                    check(answer)
                except ValueError as error:
                    raise _UnusableRowError(str(error)) from error
        return text, messages

    def _tokenizer_of(self, row: Row) -> PreTrainedTokenizerBase:
        """The tokenizer whose template knows the tools of a row's environment; raises _UnusableRowError."""
        if not self.tokenizers:
            return self.tokenizer
        name = row.columns.get(ENVIRONMENT_COLUMN)
        if not isinstance(name, str) or name not in self.tokenizers:
            known = ", ".join(self.tokenizers)
            raise _UnusableRowError(f"{ENVIRONMENT_COLUMN!r} is {name!r}, expected a name of environment.factory: "
                                    f"{known}")  # fmt: skip
        return self.tokenizers[name]


def render(prompt: str | Messages, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Turn one prompt into tokens as `PromptReader` does.

    Plain text gets the special tokens that the tokenizer puts before it, such as a BOS; a rendered conversation gets
    those of its template only, and ends where the assistant begins. Raises ValueError where the prompt is empty or the
    config's template rules and the tokenizer do not allow it.
    """
    text, messages = _as_text(prompt, config, tokenizer)
    ((_, rendered),) = _tokenise([(0, text, messages)], tokenizer)
    return rendered


class _UnusableRowError(ValueError):
    """A row cannot be used; the message says why."""


def check_columns(path: str, names: list[str], config: DataConfig) -> None:
    """Raise ValueError where a configured column is missing, or one has the name of another argument of rewards."""
    null_of = {"prompt_column": ", or to null where environments give the prompts",
               "answer_column": ", or to null where there is none"}  # fmt: skip
    for key, column in (("prompt_column", config.prompt_column), ("answer_column", config.answer_column)):
        if column is not None and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint, null = f" to {near[0]!r}" if near else "", null_of[key]
            raise ValueError(
                f"{path} has no column {column!r}; it has {list_columns(names)}. Set data.{key}{hint}{null}"
            )
    taken = [name for name in names if name in KEYWORDS and name != config.prompt_column]
    if taken:
        raise ValueError(
            f"{path} has the column(s) {', '.join(taken)}, which are names of other arguments of rewards: rename them"
        )
    if config.answer_column not in (None, "answer") and "answer" in names:
        log.warning(
            "%s: rewards receive column %r as `answer`, in place of column 'answer'", path, config.answer_column
        )


def _last(ids: list[int], most: int, bos: int | None) -> list[int]:
    """The last `most` tokens, with the BOS before them where there is one: models do not know texts without it."""
    if len(ids) <= most:
        return ids
    begin = ids[:1] if ids[0] == bos and most > 1 else []
    return begin + ids[len(ids) - most + len(begin) :]


def _wrong_length(rendered: Rendered, config: DataConfig) -> str:
    most = config.max_prompt_length
    return f"the prompt has {len(rendered.ids)} tokens, expected 1 to data.max_prompt_length = {most}"


def _as_text(
    prompt: object, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, is_filled: bool = False
) -> tuple[str, Messages | None]:
    """Apply the template rules; raises _UnusableRowError for a wrong prompt, ValueError for a wrong tokenizer."""
    messages = _as_messages(prompt, config, is_filled)
    if messages is None:
        return str(prompt), None
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path!r} has no chat template. Prompts that are messages, data.system_prompt and "
            "data.chat_template: always need one; use the model's instruct variant, or plain text prompts"
        )
    template = template_of(tokenizer)
    for role in dict.fromkeys(message["role"] for message in messages):
        if meant := meant_role(role, template):
            raise _UnusableRowError(f"the prompt has a message of the role {role!r}, expected {meant!r}")
    try:
        return render_messages(messages, tokenizer, config.template_date), messages
    except TemplateRefusal as error:
        # a template refuses messages that its model was not trained on, such as system messages
        raise _UnusableRowError(str(error)) from error


def _as_messages(prompt: object, config: DataConfig, is_filled: bool) -> Messages | None:
    """Return the conversation to render for a prompt, or None where it stays plain text."""
    system: Messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _UnusableRowError("the prompt is empty")
        if _MESSAGES_AS_TEXT.match(prompt):
            raise _UnusableRowError(
                f"the prompt is a text that contains a list of messages ({prompt[:_SHOWN_START]!r}), expected the list "
                "itself: write the data as JSON lines (.jsonl) or parquet"
            )
        if config.chat_template == "always" or system:
            return [*system, {"role": "user", "content": prompt}]
        return None
    if not isinstance(prompt, list):
        raise _UnusableRowError(f"the prompt is a {type(prompt).__name__}, expected text or a list of messages")
    if config.chat_template == "never":
        raise _UnusableRowError("the prompt is a list of messages, which data.chat_template: never cannot render")
    messages = [as_templates_expect(each, is_filled) if isinstance(each, dict) else each for each in prompt]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise _UnusableRowError(
                f"{message!r:.80} in the prompt is not a message with the texts `role` and `content`"
            )
    if not messages or messages[-1]["role"] == "assistant":
        raise _UnusableRowError("the prompt has no message at its end that the assistant can answer; a prompt with the "
                                "beginning of the answer is given as text, template included, with "
                                "data.chat_template: never")  # fmt: skip
    if system and messages[0]["role"] == "system":
        raise _UnusableRowError("the prompt has a system message, and data.system_prompt adds another; set it to null")
    return [*system, *messages]


def _tokenise(
    texts: Sequence[tuple[int, str, Messages | None]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, Rendered]]:
    """Turn (place, text, messages) into (place, rendered), in order."""
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        part = texts[start : start + _ROWS_AT_ONCE]
        ids: dict[int, list[int]] = {}
        for templated in (False, True):
            chosen = [(place, text) for place, text, messages in part if (messages is not None) == templated]
            if chosen:
                before, behind = ([], 0) if templated else _frame(tokenizer)
                # A template writes its own BOS: a tokenizer that added one as well would train on two.
                encoded = tokenizer(
                    [text for _, text in chosen],
                    add_special_tokens=not templated,
                    return_attention_mask=False,
                    verbose=False,
                )
                rows = (_once(before, row[: len(row) - behind], tokenizer) for row in encoded["input_ids"])
                ids.update(zip((place for place, _ in chosen), rows, strict=True))
        for place, text, messages in part:
            yield place, Rendered(text, messages, ids[place])


def _once(before: list[int], row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    once = begun_once(row, before)
    if len(once) < len(row):
        _warn_of_two(tokenizer, *before)
    return once


@functools.cache
def _warn_of_two(tokenizer: PreTrainedTokenizerBase, *before: int) -> None:
    names = tokenizer.convert_ids_to_tokens(list(before))
    log.warning("prompts begin with %s, as the tokenizer begins texts: they have it once", names)


@functools.cache
def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens that the tokenizer puts before a text, and how many are to be taken from the end of a text prompt; the
    log says so once."""
    before, behind = tokens_around(tokenizer)
    if behind:
        names = tokenizer.convert_ids_to_tokens(behind)
        log.warning("the tokenizer ends texts with %s; prompts are without, because completions continue them", names)
    return before, len(behind)
