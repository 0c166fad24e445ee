"""Chat templates: what comes back of a message, whatever program a model brings along."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_dist.checkpoint.resume import with_template_date
from grpo_dist.config.schema import Config, DataConfig
from grpo_dist.data.prompts import PromptReader, render
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.text import templates
from grpo_dist.text.messages import as_templates_expect, meant_role
from grpo_dist.text.templates import TemplateRefusal, closing_of, render_messages, uses_date

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = TURNS.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
QUESTION = [{"role": "user", "content": "What is 0 + 0?"}]
SYSTEM = [{"role": "system", "content": "Be brief, please."}, *QUESTION]
TURN_BY_TURN = [*QUESTION, {"role": "assistant", "content": "Zero, I think."}, {"role": "user", "content": "Sure?"}]


def tokenizer_with(template: Any, name: str = "some/model") -> Any:
    tokenizer = load_tokenizer(Config().model)
    tokenizer.chat_template, tokenizer.name_or_path = template, name
    return tokenizer


def upright(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{m['role']}>{m['content']}</s>" for m in messages) + "<assistant>"


@pytest.mark.parametrize("messages", [QUESTION, SYSTEM, TURN_BY_TURN])
@pytest.mark.parametrize(
    "template",
    [
        TURNS,
        PARTS,
        PARTS.replace("{% for part", "{% if m['content'] is string %}{{ m['content'].no }}{% endif %}{% for part"),
        "{% if messages[0].content is string %}{{ raise_exception('parts alone') }}{% endif %}" + PARTS,
        # a system message as text, everything else in parts
        TURNS.replace("{{ m['content'] }}", "{% if m['role'] == 'system' %}{{ m['content'] + '' }}{% else %}"
                      "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"),
        {"default": TURNS, "tool_use": "no"},
    ],
)  # fmt: skip
def test_messages_come_back(template: Any, messages: list[dict[str, str]]) -> None:
    assert render_messages(messages, tokenizer_with(template)) == upright(messages)


def test_an_answered_conversation_keeps_its_answer_in_parts() -> None:
    text = render_messages(TURN_BY_TURN[:2], tokenizer_with(PARTS), answered=True)
    assert text == upright(TURN_BY_TURN[:2]).removesuffix("<assistant>")


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TURNS, "</s>"),
        (PARTS, "</s>"),
        (TURNS.replace("</s>", ""), ""),
        (TURNS.replace("m['content'] }}", "m['content'] if m.role == 'user' else '' }}"), ""),
        (TURNS.replace("m['content'] }}", "m['content'] | upper }}"), ""),
        ("{{ raise_exception('no') }}", ""),
    ],
)
def test_what_ends_an_answer(template: str, closing: str) -> None:
    assert closing_of(tokenizer_with(template), None) == closing


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (TURNS.replace("m['content']", "''"), QUESTION, "leaves out or changes the text of the user message"),
        (TURNS.replace("m['content']", "m['content'][:4]"), QUESTION, "leaves out or changes the text of the user"),
        (TURNS.replace("in messages", "in messages if m.role != 'system'"), SYSTEM, "text of the system message"),
        (TURNS.replace("in messages", "in messages[-1:]"), TURN_BY_TURN, "text of the user message"),
        # a few characters that the template itself has
        ("In 2025: " + TURNS.replace("m['content']", "''"), [{"role": "user", "content": "5"}], "the user message"),
        ("{{ raise_exception('no system role') }}" + TURNS, SYSTEM, "refuses the prompt: no system role"),
        ("{{ messages[0]['content'] / 2 }}", QUESTION, "refuses the prompt: unsupported operand"),
        ("{{ strftime_now('%d' ~ '%m') }}" + TURNS, QUESTION, "the time in the format %d%m"),
    ],
)
def test_messages_that_do_not_come_back_are_refused(
    template: str, messages: list[dict[str, str]], problem: str
) -> None:
    with pytest.raises(TemplateRefusal, match=problem):
        render_messages(messages, tokenizer_with(template))


def test_calls_that_a_template_leaves_out_are_refused() -> None:
    called: list[Any] = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
                         {"role": "tool", "content": "nought"}]  # fmt: skip
    with pytest.raises(TemplateRefusal, match="leaves out the call of 'add' in tool_calls"):
        render_messages(called, tokenizer_with(TURNS))
    shows = TURNS.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    assert "add" in render_messages(called, tokenizer_with(shows))
    without: list[Any] = [{**QUESTION[0], "tool_calls": None}]
    assert render_messages(without, tokenizer_with(TURNS)) == upright(QUESTION)


def test_templates_that_cannot_be_used_at_all() -> None:
    with pytest.raises(ValueError, match=r"'some/model' draws at random.*take `random`"):
        render_messages(QUESTION, tokenizer_with("{{ ['Hi', 'Hello'] | random }}" + TURNS))
    with pytest.raises(ValueError, match=r"'some/model' has the chat templates 'rag', 'tool_use', expected one named"):
        render_messages(QUESTION, tokenizer_with({"rag": TURNS, "tool_use": TURNS}))


@pytest.mark.parametrize(
    ("template", "messages", "word"),
    [
        (TURNS.replace("m['content']", "m['content']|upper"), QUESTION, "changes white space or case of messages"),
        (TURNS.replace("m['content']", "m['content']|replace(' ', '')"), QUESTION, "changes white space or case"),
        (TURNS.replace("{% if add_generation_prompt %}<assistant>{% endif %}", ""), QUESTION,
         "ignores add_generation_prompt: the model has to write '<assistant>' itself"),
        (TURNS.replace("<assistant>", "<assistant>\n<think>\n"), QUESTION, "begins the answer itself with <think>"),
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
         "{% endif %}{% endfor %}", QUESTION, ""),
        (TURNS.replace("m['content']", "m['content'] | trim"), [{"role": "user", "content": " Hi there \n"}], ""),
    ],
)  # fmt: skip
def test_what_is_worth_a_word_is_said_once(
    template: str, messages: list[dict[str, str]], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    templates._warned.clear()
    tokenizer = tokenizer_with(template)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            render_messages(messages, tokenizer)
    assert len(caplog.records) == bool(word) and word in caplog.text


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%d %b %Y') }}\n",
        '{%- if strftime_now is defined %}{%- set today = strftime_now("%d %b %Y") %}{%- endif %}{{ today }}\n',
        "{% macro head(how) %}{{ strftime_now(how) }}{% endmacro %}{{ head('%d %b %Y') }}\n",
    ],
)
def test_a_template_is_given_the_run_s_date(clock: str) -> None:
    tokenizer = tokenizer_with("\n  " + clock + TURNS)
    given = render(QUESTION, DataConfig(template_date="2024-02-03"), tokenizer)
    assert given.text.strip().startswith("03 Feb 2024") and given.text.endswith(upright(QUESTION))
    now = render(QUESTION, DataConfig(), tokenizer).text
    assert now == tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert uses_date(tokenizer) and not uses_date(tokenizer_with(TURNS)) and not uses_date(tokenizer_with(None))


def test_a_run_keeps_the_date_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "today", lambda: "2024-02-04")
    monkeypatch.setattr("grpo_dist.checkpoint.resume.today", lambda: "2024-02-04")
    tokenizer, config = tokenizer_with("{{ strftime_now('%F') }}" + TURNS), Config()
    assert with_template_date(config, tokenizer_with(TURNS), None) is config
    assert with_template_date(config, tokenizer, None).data.template_date == "2024-02-04"
    (tmp_path / "metadata.json").write_text("{}")
    kept = {"config": {"data": {"template_date": "2024-02-03"}}}
    monkeypatch.setattr("grpo_dist.checkpoint.store.load_meta", lambda path: kept)
    resumed = with_template_date(config, tokenizer, tmp_path)
    assert resumed.data.template_date == "2024-02-03"
    given = replace(config, data=replace(config.data, template_date="2020-01-01"))
    assert with_template_date(given, tokenizer, tmp_path) is given
    with pytest.raises(ValueError, match=r"data\.template_date: '3 February' given, expected a date"):
        DataConfig(template_date="3 February")


def test_prompts_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} and the same end", "answer": "1"}) + "\n" for n in range(3)))
    tokenizer = tokenizer_with(TURNS)
    with pytest.raises(ValueError, match=r"all 3 prompts have the same 4 tokens.*too_long: truncate keeps the last 4"):
        PromptReader(DataConfig(max_prompt_length=4, too_long="truncate"), tokenizer).load(str(file), "train")
    file.write_text((json.dumps({"prompt": "one and the same", "answer": "1"}) + "\n") * 3)
    assert len(PromptReader(DataConfig(), tokenizer).load(str(file), "train")[0]) == 3, "given so, it is no mistake"


def test_messages_of_tables_and_apis() -> None:
    """None stands for nothing, and JSON for the arguments of a call."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": null}'}}
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    given = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": None}}}],
    }
    assert as_templates_expect(message) == as_templates_expect(given) == given
    filled = {
        "role": "assistant",
        "content": "5",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
    }
    assert as_templates_expect(filled) == filled
    assert as_templates_expect(filled, is_filled=True)["tool_calls"] == [
        {"function": {"name": "add", "arguments": {"a": 1}}}
    ]
    for odd in ("[1]", "no JSON", 3):
        kept = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": odd}, "add"]}
        assert as_templates_expect(kept) == kept
    assert as_templates_expect({"role": "user", "content": None}) == {"role": "user"}


def test_roles_that_a_template_knows_are_its_own() -> None:
    assert meant_role("human", "{% if m.role == 'human' %}") is None
    assert meant_role("model", '{% set role = "model" %}') is None
    assert meant_role("model", TURNS) == meant_role("GPT", TURNS) == "assistant"
    assert meant_role("tool", TURNS) is meant_role("documents", TURNS) is None


THINKS = (  # as Qwen3's: a variable that nobody gives is not false
    "{% macro thought() %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no thought>{% endif %}{% endmacro %}"
    + TURNS + "{{ thought() }}{{ note | default('') }}"
)  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "end"),
    [
        ({}, ""), ({"enable_thinking": False}, "<no thought>"), ({"enable_thinking": True}, ""),
        ({"note": "é\"\n'"}, "é\"\n'"), ({"enable_thinking": False, "note": None}, "<no thought>None"),
    ],
)  # fmt: skip
def test_variables_of_a_template(tmp_path: Path, variables: dict[str, Any], end: str) -> None:
    tokenizer_with(THINKS).save_pretrained(tmp_path)
    shown = upright(QUESTION)
    model = replace(Config().model, tokenizer=str(tmp_path), chat_template_kwargs=variables)
    tokenizer = load_tokenizer(model)
    assert render_messages(QUESTION, tokenizer) == shown + end
    # the trained model's template has them too, and gives way to what its user or the next training says
    tokenizer.save_pretrained(tmp_path)
    assert render_messages(QUESTION, load_tokenizer(model)) == shown + end
    other = load_tokenizer(replace(model, chat_template_kwargs={"enable_thinking": "enable_thinking" not in variables}))
    assert ("<no thought>" in render_messages(QUESTION, other)) == ("enable_thinking" in variables)
    asked = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert asked.startswith(shown + "<no thought>")


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "tools", "eos_token", "thought()"])
def test_variables_that_a_template_does_not_read(tmp_path: Path, name: str) -> None:
    tokenizer_with({"default": THINKS, "tool_use": THINKS + "{{ tools }}{{ eos_token }}"}).save_pretrained(tmp_path)
    model = replace(Config().model, tokenizer=str(tmp_path), chat_template_kwargs={name: 1, "note": "b"})
    with pytest.raises(ValueError, match=r"^model.chat_template_kwargs: '.*' given, expected a variable that the chat"):
        load_tokenizer(model)
    several = load_tokenizer(replace(model, chat_template_kwargs={"note": "b"}))
    assert render_messages(QUESTION, several) == upright(QUESTION) + "b"
