"""How a chat template continues a conversation after tools have answered, and how its model writes calls of them.

What a model sampled is never decoded and encoded again. What a tool's answer adds is read off two renderings of a
made-up conversation, with the answer and without it: the tokens between the end of the model's turn and the beginning
of its next one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .templates import render_conversation, template_of, warn_once

CALL_ID = "call00000"
"""Mistral's templates ask for nine letters and digits."""
_SENTINEL = "qzxanswerqzx"


@dataclass(frozen=True)
class Call:
    """A call that the model wrote."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None
    """Why it cannot be made: what the model wrote is no call."""


@dataclass(frozen=True)
class Answer:
    """What one of a turn's calls gave."""

    name: str
    text: str


def with_tools(tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> Any:
    """The tokenizer with a chat template that knows the tools (JSON schemas), for rendering prompts."""
    changed, names = copy.copy(tokenizer), [schema["function"]["name"] for schema in schemas]
    changed.chat_template = f"{{%- set tools = {_literal(list(schemas))} -%}}\n{template_of(tokenizer, 'tool_use')}"
    shown = render_conversation([{"role": "user", "content": "Go on."}], changed, None, is_prompt=True)
    if missing := [name for name in names if name not in shown]:
        warn_once(tokenizer, f"does not show {', '.join(missing)} to the model: it has to know its tools by itself")
    return changed


class ToolTurns:
    """Reads calls off a turn, and gives the tokens that tools' answers add after it."""

    def __init__(
        self, tokenizer: Any, end_ids: Sequence[int], template_date: str | None = None, call_format: str = "auto"
    ) -> None:
        """`tokenizer` knows the tools, `end_ids` end a turn. Raises ValueError where the template cannot be continued
        with a tool's answer, or nobody knows how the model writes calls."""
        self._tokenizer, self._date = tokenizer, template_date
        self._ends = [tokenizer.convert_ids_to_tokens(number) for number in end_ids]
        self._read = _reader(tokenizer, call_format)
        added = tokenizer.added_tokens_decoder.values()
        self._specials = [str(token) for token in added if token.special and len(str(token)) > 1]
        if _SENTINEL not in self._between([Answer("tool", _SENTINEL)]):
            raise ValueError(f"the chat template of {tokenizer.name_or_path!r} leaves out what a tool answers")

    def calls(self, text: str) -> list[Call]:
        """The calls in the text of a turn, in order; what begins as a call and is none has a `problem`."""
        return self._read(text)

    def answer_ids(self, answers: Sequence[Answer], *, is_open: bool = False) -> list[int]:
        """Token ids from the end of the model's turn to the beginning of its next, with a turn's answers in order; for
        a turn that `is_open`, whose end token was not sampled, that token too.

        An answer that spells a special token gets a space into it: no tool may end a turn or begin another. Raises
        ValueError where the template refuses the answers.
        """
        texts = [Answer(each.name, self._without_specials(each.text)) for each in answers]
        return self._tokenizer(self._between(texts, is_open), add_special_tokens=False)["input_ids"]

    def _between(self, answers: Sequence[Answer], is_open: bool = False) -> str:
        """The text from the end of the model's turn to the beginning of its next."""
        calls = [{"type": "function", "id": CALL_ID, "function": {"name": each.name, "arguments": {}}}
                 for each in answers]  # fmt: skip
        asked: list[dict[str, Any]] = [{"role": "user", "content": "Go on."},
                                       {"role": "assistant", "content": "", "tool_calls": calls}]  # fmt: skip
        answered = [{"role": "tool", "name": each.name, "tool_call_id": CALL_ID, "content": each.text}
                    for each in answers]  # fmt: skip
        name = self._tokenizer.name_or_path
        try:
            before = render_conversation(asked, self._tokenizer, self._date, is_prompt=False)
            after = render_conversation([*asked, *answered], self._tokenizer, self._date, is_prompt=True)
        except Exception as error:  # a template is a program, and may raise what it likes
            raise ValueError(f"the chat template of {name!r} takes no answers of tools: {error}") from error
        call = before.rfind(answers[-1].name)
        ends = [(before.rfind(end) + len(end), end) for end in self._ends if before.rfind(end) > call]
        turn_end, end = max(ends, default=(len(before), ""))
        if not after.startswith(before[:turn_end]):
            raise ValueError(
                f"the chat template of {name!r} writes earlier turns anew when a tool has answered, so that the tokens "
                "that were sampled are no part of the conversation any more: use a template that only appends"
            )
        return end * is_open + after[turn_end:]

    def _without_specials(self, text: str) -> str:
        for token in self._specials:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _literal(value: Any) -> str:
    """A JSON value as a Jinja expression."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _reader(tokenizer: Any, call_format: str) -> Callable[[str], list[Call]]:
    """How calls are read; raises ValueError where that is not known."""
    if call_format != "auto":
        return READERS[call_format]
    if getattr(tokenizer, "response_schema", None):
        return lambda text: _parsed(tokenizer, text)
    template = template_of(tokenizer, "tool_use")
    for name, mark in MARKS.items():
        if mark in template:
            return READERS[name]
    raise ValueError(
        f"environment.call_format: nothing in the chat template of {tokenizer.name_or_path!r} says how its model calls "
        f"tools; give one of {', '.join(READERS)}, or a model whose template knows tools"
    )


def _parsed(tokenizer: Any, text: str) -> list[Call]:
    """By the tokenizer's own schema of responses."""
    try:
        message = tokenizer.parse_response(text)
    except Exception as error:  # what it raises depends on the schema
        return [Call("", {}, f"{type(error).__name__}: {error}")]
    return [_call(each.get("function", each)) for each in message.get("tool_calls") or []]


def _hermes(text: str) -> list[Call]:
    calls = []
    for piece in text.split("<tool_call>")[1:]:
        body, end, _ = piece.partition("</tool_call>")
        calls += _from_json(body) if end else [Call("", {}, "<tool_call> is not closed")]
    return calls


def _llama3(text: str) -> list[Call]:
    body = text.strip().removeprefix("<|python_tag|>").strip()
    return _from_json(body) if body.startswith("{") or text.strip().startswith("<|python_tag|>") else []


def _mistral(text: str) -> list[Call]:
    calls = []
    for piece in text.split("[TOOL_CALLS]")[1:]:
        name, mark, arguments = piece.partition("[ARGS]")
        calls += _from_json(f'{{"name": {json.dumps(name.strip())}, "arguments": {arguments}}}' if mark else piece)
    return calls


def _harmony(text: str) -> list[Call]:
    found = re.findall(r"to=functions\.([\w.-]+).*?<\|message\|>(.*?)(?:<\|call\|>|<\|start\|>|$)", text, re.DOTALL)
    return [call for name, body in found for call in _from_json(f'{{"name": {json.dumps(name)}, "arguments": {body}}}')]


def _from_json(text: str) -> list[Call]:
    try:
        value = json.loads(text)
    except ValueError as error:
        return [Call("", {}, f"not JSON: {error}")]
    return [_call(each) for each in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", {}, "a call is an object with `name` and `arguments`")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            return Call(value["name"], {}, f"its arguments are not JSON: {error}")
    if not isinstance(arguments, dict):
        return Call(value["name"], {}, "its arguments are not an object")
    return Call(value["name"], arguments)


READERS: dict[str, Callable[[str], list[Call]]] = {
    "hermes": _hermes, "llama3": _llama3, "mistral": _mistral, "harmony": _harmony,
}  # fmt: skip
"""How families of models write calls; `hermes` is Qwen's, SmolLM's and many others'."""
MARKS = {"hermes": "<tool_call>", "harmony": "to=functions.", "mistral": "[TOOL_CALLS]", "llama3": '"parameters"'}
"""What a template of such a family has in it."""
