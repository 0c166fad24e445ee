"""How models write calls of tools, by family: from the text of a turn to the calls in it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]
"""By the tools' names, the part `parameters` of their JSON schemas."""
_DEEPEST = 50
"""Levels of a call's arguments: what is written to files and sent to processes is nested a little deeper."""
_HALF = "half a character (a lone surrogate) in it"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?", re.DOTALL)
_KEY_AND_VALUE = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*)", re.DOTALL)
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_MESSAGE_END = re.compile(r"<\|call\|>|<\|start\|>|\Z")
_WORDS = {"true": True, "false": False, "none": None, "null": None}
"""What templates write for values of these kinds, some as Python does."""


@dataclass(frozen=True)
class Call:
    """A call that the model wrote."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None
    """Why it cannot be made: what the model wrote is no call."""


def _in_tags(text: str, read: Callable[[str], list[Call]]) -> list[Call]:
    """The calls between <tool_call> and </tool_call>, each read by `read`."""
    calls = []
    for piece in text.split("<tool_call>")[1:]:
        body, end, _ = piece.partition("</tool_call>")
        calls += read(body) if end else [Call("", {}, "<tool_call> is not closed")]
    return calls


def _hermes(text: str, tools: Tools) -> list[Call]:
    return _in_tags(text, _from_json)


def _qwen_xml(text: str, tools: Tools) -> list[Call]:
    def read(body: str) -> list[Call]:
        if (function := _FUNCTION.fullmatch(body)) is None:
            return [Call("", {}, "a call is <function=NAME> with a </function>")]
        what = "<parameter=NAME> with a </parameter>"
        return [_tagged(function[1], _PARAMETER, function[2].split("</parameter>"), what, tools)]

    return _in_tags(text, read)


def _glm(text: str, tools: Tools) -> list[Call]:
    def read(body: str) -> list[Call]:
        name, mark, arguments = body.partition("<arg_key>")
        pieces, what = (mark + arguments).split("</arg_value>"), "an <arg_key> and an <arg_value>"
        return [_tagged(name.strip(), _KEY_AND_VALUE, pieces, what, tools)]

    return _in_tags(text, read)


def _tagged(name: str, pattern: re.Pattern[str], pieces: list[str], what: str, tools: Tools) -> Call:
    """A call whose arguments have tags, so that their values are texts; a piece goes up to the tag that closes one."""
    *pieces, rest = pieces
    found = [pair for piece in pieces if (pair := pattern.fullmatch(piece))]
    if rest.strip() or len(found) < len(pieces):
        return Call(name, {}, f"an argument is {what}")
    schemas = tools.get(name, {}).get("properties", {})
    arguments = {pair[1]: _typed(pair[2], schemas.get(pair[1], {})) for pair in found}
    return call_of({"name": name, "arguments": arguments})


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """What a text stands for: itself where a text is asked for, else a value of JSON where it is one."""
    word = text.lower()
    if schema.get("nullable") and word in _WORDS and _WORDS[word] is None:
        return None
    if schema.get("type") == "string":
        return text
    try:
        return _WORDS[word] if word in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _llama3(text: str, tools: Tools) -> list[Call]:
    body = text.strip().removeprefix("<|python_tag|>").strip()
    return _from_json(body) if body.startswith("{") or text.strip().startswith("<|python_tag|>") else []


def _mistral(text: str, tools: Tools) -> list[Call]:
    calls = []
    for piece in text.split("[TOOL_CALLS]")[1:]:
        name, mark, arguments = piece.partition("[ARGS]")
        calls += _from_json(f'{{"name": {json.dumps(name.strip())}, "arguments": {arguments}}}' if mark else piece)
    return calls


def _harmony(text: str, tools: Tools) -> list[Call]:
    calls, place = [], 0
    while (recipient := _RECIPIENT.search(text, place)) and (mark := text.find("<|message|>", recipient.end())) >= 0:
        begin = mark + len("<|message|>")
        end = _MESSAGE_END.search(text, begin)
        assert end is not None, "at the latest the text's end"
        calls += _from_json(f'{{"name": {json.dumps(recipient[1])}, "arguments": {text[begin : end.start()]}}}')
        place = end.end()
    return calls


def _from_json(text: str) -> list[Call]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [Call("", {}, f"not JSON: {error}")]
    return [call_of(each) for each in (value if isinstance(value, list) else [value])]


def call_of(value: Any) -> Call:
    """The call that an object of JSON is, with a `problem` where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", {}, "a call is an object with `name` and `arguments`")
    name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
    if not _is_text(name):
        return Call("", {}, _HALF)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return Call(name, {}, f"its arguments are not JSON: {error}")
    if not isinstance(arguments, dict):
        return Call(name, {}, "its arguments are not an object")
    if _is_deep(arguments, _DEEPEST):
        return Call(name, {}, "its arguments are nested too deeply")
    if not _is_text(json.dumps(arguments, ensure_ascii=False)):
        return Call("", {}, _HALF)
    return Call(name, arguments)


def _is_text(text: str) -> bool:
    """Whether files and tokenizers take a text: JSON can spell half a character, which they do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(value: Any, levels: int) -> bool:
    """Whether a JSON value has more levels than these."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


READERS: dict[str, Callable[[str, Tools], list[Call]]] = {
    "hermes": _hermes, "llama3": _llama3, "mistral": _mistral, "harmony": _harmony, "qwen_xml": _qwen_xml, "glm": _glm,
}  # fmt: skip
"""`hermes` is Qwen 2.5's and 3's, SmolLM's and many others', `qwen_xml` Qwen3-Coder's, Qwen 3.5's and Nemotron 3's."""
MARKS = {
    "qwen_xml": "<function=",
    "glm": "<arg_key>",
    "hermes": "<tool_call>",
    "harmony": "<|channel|>commentary",
    "mistral": "[TOOL_CALLS]",
    "llama3": '"parameters"',
}
"""What a template of such a family has in it; the first one counts."""
