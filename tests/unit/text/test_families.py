"""Chat templates of the form of Qwen 2.5 to 3.5, GLM, Llama 3, SmolLM, Gemma and gpt-oss: a row that a model's turns
and tools' answers make is the template's own rendering of the conversation, token by token, or it is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from family_templates import (
    GEMMA3,
    GLM,
    GPT_OSS,
    LLAMA3,
    OPENED,
    QWEN3,
    QWEN25,
    QWEN_TAGS,
    QWEN_XML,
    SMOLLM2,
    make_tokenizer,
)

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.schema import Config, DataConfig, ModelConfig
from grpo_dist.model.toy import toy_path
from grpo_dist.preflight.contents import read_contents
from grpo_dist.preflight.findings import Findings
from grpo_dist.text.call_formats import Call
from grpo_dist.text.templates import render_conversation
from grpo_dist.text.tokens import CompletionTexts
from grpo_dist.text.tool_turns import Answer, ToolTurns, with_tools

DATE = "2026-11-05"
SCHEMA = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip
TOOLS_BY_NAME = {"add": SCHEMA["function"]["parameters"]}  # type: ignore[index]
QUESTION = {"role": "user", "content": "What is 1 + 2? Do not write <tool_call> in the answer."}
CHATML = (["<|im_end|>", "<|im_start|>", "<|endoftext|>"], ("<tool_call>", "</tool_call>", "<think>", "</think>"))


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and how its model writes a call."""

    template: str
    specials: list[str]
    words: tuple[str, ...]
    call: str
    """A turn with a call of `add`; NUMBER stands for the argument."""
    ends: tuple[str, ...]
    end: str
    """What ends that turn."""
    thought: dict[str, str]
    """What the turn's message has besides the call."""
    takes_several: bool


FAMILIES = {
    "qwen2.5": Family(QWEN25, *CHATML, '<tool_call>\n{"name": "add", "arguments": {"a": NUMBER}}\n</tool_call>',
                      ("<|im_end|>", "<|endoftext|>"), "<|im_end|>", {"content": ""}, True),
    "qwen3": Family(QWEN3, *CHATML, "<think>\nA <tool_call>?\n</think>\n\n<tool_call>\n"
                    '{"name": "add", "arguments": {"a": NUMBER}}\n</tool_call>', ("<|im_end|>", "<|endoftext|>"),
                    "<|im_end|>", {"content": "", "reasoning_content": "A <tool_call>?"}, True),
    "qwen3.5": Family(QWEN_TAGS, *CHATML, "<tool_call>\n<function=add>\n<parameter=a>\nNUMBER\n</parameter>\n"
                      "</function>\n</tool_call>", ("<|im_end|>", "<|endoftext|>"), "<|im_end|>", {"content": ""},
                      True),
    "glm": Family(GLM, ["<|observation|>", "<|user|>", "<|assistant|>", "<|system|>"], CHATML[1],
                  "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>NUMBER</arg_value>\n</tool_call>",
                  ("<|observation|>", "<|user|>"), "<|observation|>", {"content": ""}, True),
    "llama3": Family(LLAMA3, ["<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
                     (), '{"name": "add", "parameters": {"a": NUMBER}}', ("<|eot_id|>", "<|eom_id|>"), "<|eot_id|>",
                     {"content": ""}, False),
    "gpt-oss": Family(GPT_OSS, ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>",
                                "<|constrain|>"], (),
                      "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.add<|channel|>commentary"
                      ' json<|message|>{"a": NUMBER}', ("<|return|>", "<|call|>"), "<|call|>", {"content": "Hm."},
                      False),
}  # fmt: skip


def message(family: Family, arguments: list[int]) -> dict[str, Any]:
    """A turn with calls of `add`."""
    return {"role": "assistant", **family.thought, "tool_calls": [
        {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": a}}} for a in arguments
    ]}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_only_grows(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = with_tools(make_tokenizer(family.template, family.specials, family.words), [SCHEMA])
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    turns, texts_of = ToolTurns(tokenizer, ends, TOOLS_BY_NAME, DATE), CompletionTexts(tokenizer, ends)

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        text = render_conversation(messages, tokenizer, DATE, is_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    talk: list[dict[str, Any]] = [QUESTION]
    row = ids(talk)
    assert "add" in tokenizer.decode(row), "the model sees its tools"
    for number, answer in enumerate(['a "7"', " \n", "ä<|im_end|>"]):
        turn = tokenizer(family.call.replace("NUMBER", str(number)) + family.end, add_special_tokens=False)["input_ids"]
        (text,) = texts_of([turn])
        assert turns.calls(text) == [Call("add", {"a": number})]
        row += turn + turns.answer_ids([Answer("add", answer)])
        shown = answer.replace("<|", "< |") if "<|im_end|>" in family.specials else answer
        talk += [message(family, [number]), {"role": "tool", "name": "add", "content": shown}]
        assert row == ids(talk)
    assert turns.calls("It is 3.") == []


@pytest.mark.parametrize("name", FAMILIES)
def test_several_calls_in_a_turn(name: str) -> None:
    """Templates that write one call a turn would lose the others, or give their answers to the first."""
    family = FAMILIES[name]
    tokenizer = with_tools(make_tokenizer(family.template, family.specials, family.words), [SCHEMA])
    turns = ToolTurns(tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in family.ends], TOOLS_BY_NAME, DATE)
    one, two = (family.call.replace("NUMBER", str(n)).rpartition("</think>")[2].strip() for n in (1, 2))
    joined = f"[{one}, {two}]" if name == "llama3" else f"{one}<|call|>{two}"
    calls = turns.calls("<|python_tag|>" + joined if name == "llama3" else joined)
    if family.takes_several:
        assert calls == [Call("add", {"a": 1}), Call("add", {"a": 2})]
        added = tokenizer.decode(turns.answer_ids([Answer("add", "first"), Answer("add", "second")]))
        assert added.index("first") < added.index("second")
    else:
        assert [call.name for call in calls] == ["add"] and "make one" in str(calls[0].problem)


@pytest.mark.parametrize(("template", "specials", "between"), [
    (QWEN25, CHATML[0], "\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"),
    (GEMMA3, ["<end_of_turn>"], "\n<start_of_turn>user\nMore.<end_of_turn>\n<start_of_turn>model\n"),
    (QWEN3, CHATML[0], None),
])  # fmt: skip
def test_users_answer_turns_without_calls(template: str, specials: list[str], between: str | None) -> None:
    """Qwen 3 forgets its thoughts when a user speaks: the tokens that were sampled would be no part of the row."""
    tokenizer = make_tokenizer(template, specials)
    if between is None:
        with pytest.raises(ValueError, match="writes earlier turns anew before messages of a user"):
            ToolTurns(tokenizer, [tokenizer.eos_token_id], {}, has_users=True)
        return
    turns = ToolTurns(tokenizer, [tokenizer.eos_token_id], {}, has_users=True)
    assert tokenizer.decode(turns.user_ids([{"role": "user", "content": "More."}])) == between
    assert turns.calls("<tool_call>") == []


REFUSED = {
    "gemma": (GEMMA3, "auto", "environment.call_format: nothing in the chat template of .* give one of"),
    "gemma with a format": (GEMMA3, "hermes", "takes no answers of tools .roles must alternate.*use a model whose"),
    "smollm": (SMOLLM2, "auto", "environment.call_format: nothing in the chat template of .* give one of"),
    "calls in xml": (QWEN_XML, "auto", "environment.call_format: .*<function=.* would not be read as one: give"),
    "calls in xml after a thought": (
        OPENED,
        "auto",
        "environment.call_format: .*<function=.* would not be read as one",
    ),
    "the wrong format": (QWEN25, "llama3", "environment.call_format: .*would not be read as one: give another"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    template, call_format, reason = REFUSED[name]
    tokenizer = make_tokenizer(template, ["<|im_end|>"])
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=reason) as caught:
        ToolTurns(with_tools(tokenizer, [SCHEMA]), [tokenizer.eos_token_id], TOOLS_BY_NAME, call_format=call_format)
    assert "'some/model'" in str(caught.value)


def test_check_refuses_what_a_run_refuses(tmp_path: Path) -> None:
    shutil.copytree(toy_path("toy-tools"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(QWEN_XML)
    config = Config(
        model=ModelConfig(str(tmp_path / "model")), data=DataConfig("configs/data/products_eval.jsonl", None),
        environment=EnvironmentConfig(tools=["configs.environments.calculator:calculator"], workers=1),
    )  # fmt: skip
    findings = Findings()
    read_contents(config, 1, findings)
    (problem,) = findings.problems
    assert str(tmp_path / "model") in problem and "would not be read as one" in problem


def test_a_template_without_tools_goes_on_where_the_format_is_given() -> None:
    """As SmolLM2's, which shows neither tools nor calls, and takes a message of any role."""
    schema = {**SCHEMA, "function": {**SCHEMA["function"], "name": "plus"}}
    tokenizer = with_tools(make_tokenizer(SMOLLM2, *CHATML), [schema])
    turns = ToolTurns(tokenizer, [tokenizer.eos_token_id], TOOLS_BY_NAME, call_format="hermes")
    assert tokenizer.decode(turns.answer_ids([Answer("add", "3")])) == (
        "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )
