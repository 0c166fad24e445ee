"""Calls whose arguments have tags of their own, and values that are typed by the tool's schema."""

from __future__ import annotations

import time
from typing import Any

import pytest

from grpo_dist.text.call_formats import READERS, Call

TOOLS = {"find": {"type": "object", "properties": {
    "text": {"type": "string"}, "count": {"type": "integer"}, "exact": {"type": "boolean"}, "anything": {},
    "perhaps": {"type": "string", "nullable": True}, "several": {"type": ["integer", "string"]},
}}}  # fmt: skip


def in_tags(name: str, arguments: dict[str, str]) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def in_pairs(name: str, arguments: dict[str, str]) -> str:
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


WRITTEN = {"qwen_xml": in_tags, "glm": in_pairs}


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "7", "7"), ("text", "true", "true"), ("text", "null", "null"), ("text", "", ""),
        ("text", "two\nlines <b>", "two\nlines <b>"), ("text", ' {"a": 1} ', ' {"a": 1} '), ("count", "7", 7),
        ("count", "seven", "seven"), ("exact", "True", True), ("exact", "false", False), ("exact", "None", None),
        ("anything", "[1, 2]", [1, 2]), ("anything", "word", "word"), ("perhaps", "null", None), ("perhaps", "7", "7"),
        ("several", "7", 7), ("several", "x", "x"), ("unknown", "1.5", 1.5),
    ],
)  # fmt: skip
def test_values_are_of_the_schemas_types(family: str, name: str, text: str, value: Any) -> None:
    turn = f"I look it up.\n{WRITTEN[family]('find', {name: text})}"
    assert READERS[family](turn, TOOLS) == [Call("find", {name: value})]


@pytest.mark.parametrize("family", WRITTEN)
def test_turns_with_several_calls_and_with_none(family: str) -> None:
    first, second = WRITTEN[family]("find", {"text": "a", "count": "2"}), WRITTEN[family]("now", {})
    assert READERS[family](f"{first}\n{second}", TOOLS) == [
        Call("find", {"text": "a", "count": 2}), Call("now", {}),
    ]  # fmt: skip
    assert READERS[family]("It is 3.", TOOLS) == []


@pytest.mark.parametrize(
    ("family", "text", "problem"),
    [
        ("qwen_xml", "<tool_call>\n<function=find>\n", "not closed"),
        ("qwen_xml", '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>', "a call is <function=NAME>"),
        (
            "qwen_xml",
            "<tool_call><function=find><parameter=text>a</function></tool_call>",
            "argument is <parameter=",
        ),
        ("qwen_xml", "<tool_call><function=find>a</function></tool_call>", "argument is <parameter="),
        ("glm", "<tool_call>find\n<arg_key>text</arg_key>\n</tool_call>", "an argument is an <arg_key>"),
        ("glm", "<tool_call>find\n", "not closed"),
    ],
)
def test_what_is_no_call(family: str, text: str, problem: str) -> None:
    (call,) = READERS[family](text, TOOLS)
    assert problem in str(call.problem) and call.arguments == {}


@pytest.mark.parametrize(
    ("family", "begin", "repeated", "end"),
    [
        ("qwen_xml", "<tool_call><function=f>", "<parameter=a>", "</function></tool_call>"),
        ("glm", "<tool_call>f", "<arg_key>a</arg_key><arg_value>", "</tool_call>"),
        ("glm", "<tool_call>f", "<arg_key>a</arg_value>", "</tool_call>"),
        ("harmony", "to=functions.", "f", ""), ("harmony", "", "to=functions.f", ""),
        ("harmony", "", "to=functions.f<|message|>", ""), ("hermes", "", "<tool_call>", ""),
        ("mistral", "", "[TOOL_CALLS]f[ARGS]", ""), ("llama3", '{"a":', '{"a":', ""),
    ],
)  # fmt: skip
def test_what_a_collapsed_model_repeats_is_read_in_no_time(family: str, begin: str, repeated: str, end: str) -> None:
    """Turns are read in the trainer's process, which can do nothing else meanwhile."""
    turn = begin + repeated * (500_000 // len(repeated)) + end
    begun = time.perf_counter()
    assert all(call.problem for call in READERS[family](turn, TOOLS))
    assert time.perf_counter() - begun < 3
