"""Chat templates: from messages to the text that a model sees, with a check of that text.

A template is a program that comes with a model. It may take messages only as lists of parts, leave some out, write
today's date, or draw at random. The rendered text is therefore compared with the messages, and the template gets the
date of the run.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]

_CLOCK = "strftime_now"
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
_FORMATS = re.compile(r"'([^'{}\n]*%[^'{}\n]*)'|\"([^\"{}\n]*%[^\"{}\n]*)\"")
_OPENING_TAG = re.compile(r"<((?!assistant|model|bot)\w+)>\s*$")  # but not the head of a turn
_READ_ROLES = ("system", "developer", "user")  # templates shorten an assistant's messages, such as its thoughts
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
"""What a template always gets from whoever renders it."""
_SHORT_CHARACTERS = 8
_SENTINEL = "qzxsentinelqzx"
_ASKED, _SAID = "qzxquestionqzx", "qzxanswerqzx"
_SHOWN_CHARACTERS = 60
_warned: set[tuple[str, str]] = set()
_comes_back_at: dict[tuple[Any, ...], bool] = {}


class TemplateRefusal(ValueError):
    """A template cannot render a conversation, or leaves a part of it out; the message says why."""


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template may write today's date."""
    return bool(tokenizer.chat_template) and _CLOCK in template_of(tokenizer)


def today() -> str:
    """Today's date in the form of data.template_date."""
    return datetime.now().date().isoformat()


def render_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, template_date: str | None = None, *,
    answered: bool = False,
) -> str:  # fmt: skip
    """Return the text of a conversation, which ends where the assistant begins, or with its answer (`answered`).

    The template gets `template_date` (YYYY-MM-DD; None for today's) as the current date. Messages whose text is not in
    the result are rendered again as lists of parts. Raises TemplateRefusal where the template refuses a conversation or
    leaves out the text of a message, ValueError where it cannot be used at all.
    """
    template = _steady_template(tokenizer, template_date)
    plain = [dict(message) for message in messages]

    def attempt(in_parts: Collection[int]) -> tuple[str | None, list[int], str]:
        return _attempt(plain, in_parts, tokenizer, template, is_prompt=not answered)

    text, missing, reason = attempt(())
    if missing or text is None:
        text, left, _ = attempt(missing or range(len(plain)))
        if left and missing:
            text, left, _ = attempt(range(len(plain)))
        if left or text is None:
            raise TemplateRefusal(reason or _left_out(plain[missing[0]]))
    _require_calls(plain, text)
    if not answered:
        _warn_of_openings(tokenizer, template, text)
    return text


def render_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template_date: str | None, *,
    is_prompt: bool,
) -> str:  # fmt: skip
    """Return the text of any conversation, tools' calls and answers included, unexamined; raises as templates do."""
    return _apply(messages, tokenizer, _steady_template(tokenizer, template_date), is_prompt)


def template_of(tokenizer: PreTrainedTokenizerBase, preferred: str = "default") -> str:
    """The chat template, of several the `preferred` one or the default; raises ValueError where there is neither."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        if preferred in template:
            return str(template[preferred])
        if "default" not in template:
            raise ValueError(f"{tokenizer.name_or_path!r} has the chat templates {', '.join(map(repr, template))}, "
                             "expected one named 'default': rename the one to use")  # fmt: skip
        template = template["default"]
    return str(template)


def with_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> str | dict[str, str]:
    """The tokenizer's chat template, or its several by name, with values for variables that whoever renders it leaves
    out; raises ValueError where it has no such variable."""
    given = tokenizer.chat_template or ""
    templates = dict(given) if isinstance(given, Mapping) else {"default": str(given)}
    fixed = {*_GIVEN, *tokenizer.special_tokens_map}
    for name in variables:
        known = name.isidentifier() and any(re.search(rf"\b{name}\b", template) for template in templates.values())
        if name in fixed or not known:
            raise ValueError(
                f"model.chat_template_kwargs: {name!r} given, expected a variable that the chat template of "
                f"{tokenizer.name_or_path!r} reads and that may be set, such as enable_thinking in Qwen3's"
            )
    lines = "".join(f"{{%- if {name} is not defined -%}}{{%- set {name} = {literal(value)} -%}}{{%- endif -%}}\n"
                    for name, value in variables.items())  # fmt: skip
    templates = {name: lines + template for name, template in templates.items()}
    return templates if isinstance(given, Mapping) else templates["default"]


def literal(value: Any) -> str:
    """A JSON value as a Jinja expression."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _steady_template(tokenizer: PreTrainedTokenizerBase, template_date: str | None) -> str:
    """The template, which writes the same at any time; raises ValueError for one that draws at random."""
    template = template_of(tokenizer)
    if _RANDOM.search(template):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} draws at random, so that a prompt differs each time: "
            "take `random` and `lipsum` out of it"
        )
    return _with_date(template, date.fromisoformat(template_date or today())) if _CLOCK in template else template


def _with_date(template: str, day: date) -> str:
    """The template with a fixed date: a macro in place of transformers' function `strftime_now`."""
    formats = {single or double for single, double in _FORMATS.findall(template)}
    known = {each: datetime(day.year, day.month, day.day).strftime(each) for each in sorted(formats)}
    return (f"{{%- macro {_CLOCK}(format) -%}}{{%- set known = {json.dumps(known, ensure_ascii=False)} -%}}"
            "{%- if format not in known -%}{{ raise_exception('it asks for the time in the format ' ~ format ~ "
            "', which is not written in it as a text') }}{%- endif -%}"
            f"{{{{ known[format] }}}}{{%- endmacro %}}\n{template}")  # fmt: skip


def _attempt(
    messages: Messages, in_parts: Collection[int], tokenizer: PreTrainedTokenizerBase, template: str, *, is_prompt: bool
) -> tuple[str | None, list[int], str]:
    """The rendered text (None where the template refuses), the places of messages that are not in it, and the refusal.

    The template gets the messages at the places `in_parts` as lists of one part.
    """

    def rendered(texts: Sequence[str]) -> str:
        contents = [[{"type": "text", "text": text}] if n in in_parts else text for n, text in enumerate(texts)]
        given = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return _apply(given, tokenizer, template, is_prompt)

    def comes_back(n: int) -> bool:
        return _comes_back(rendered([*texts[:n], _SENTINEL, *texts[n + 1 :]]))

    texts = [message["content"] for message in messages]
    try:
        text = rendered(texts)
        missing = set(_missing(messages, text, tokenizer))
        for n, message in enumerate(messages):
            is_there = True
            if not _is_read(message):
                key = (template, n, n in in_parts, *(each["role"] for each in messages))
                if key not in _comes_back_at:
                    _comes_back_at[key] = comes_back(n)
                is_there = _comes_back_at[key]
            # a few characters may be in the template itself, and parts may be rendered as Python writes them
            elif texts[n].strip() and (n in in_parts or len(texts[n]) < _SHORT_CHARACTERS):
                is_there = comes_back(n)
            if not is_there:
                missing.add(n)
    except Exception as error:  # a template is a program, and may raise anything
        return None, [], f"the model's chat template refuses the prompt: {error}"
    return text, sorted(missing), ""


def _comes_back(text: str) -> bool:
    """Whether the sentinel is in a rendered text as itself, and not as Python or JSON writes a list."""
    text = text.casefold()
    return _SENTINEL in text and f"'{_SENTINEL}'" not in text and f'"{_SENTINEL}"' not in text


def _apply(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, is_prompt: bool
) -> str:
    given = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(
        given, chat_template=template, tokenize=False, add_generation_prompt=is_prompt
    ))  # fmt: skip


def _require_calls(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise TemplateRefusal where a call of a tool that a message has is not in the rendered text."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for name in [str((call.get("function") or call).get("name")) for call in calls]:
        if name not in text:
            raise TemplateRefusal(f"the model's chat template leaves out the call of {name!r} in tool_calls of a "
                                  "message: take such messages out, or correct the template")  # fmt: skip


def closing_of(tokenizer: PreTrainedTokenizerBase, template_date: str | None) -> str:
    """What the chat template writes after an answer, without white space around it; empty where it writes nothing, or
    takes no question and answer."""
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    try:
        text = render_messages(messages, tokenizer, template_date, answered=True)
    except ValueError:  # the template takes no such conversation; only the data's conversations matter
        return ""
    _, found, closing = text.rpartition(_SAID)
    return closing.strip() if found else ""


def _is_read(message: Mapping[str, str]) -> bool:
    return message["role"] in _READ_ROLES


def _missing(messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Places of messages whose text is not in the rendered one, apart from white space and case."""
    expected = Counter(message["content"].strip() for message in messages if _is_read(message))
    absent = {content for content, count in expected.items() if text.count(content) < count}
    if absent:
        squeezed = _squeezed(text)
        changed = {content for content in absent if squeezed.count(_squeezed(content)) >= expected[content]}
        if changed:
            warn_once(tokenizer, "changes white space or case of messages: the model does not see the data's text",
                       f", such as {min(changed)[:_SHOWN_CHARACTERS]!r}")  # fmt: skip
        absent -= changed
    return [n for n, message in enumerate(messages) if _is_read(message) and message["content"].strip() in absent]


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def _left_out(message: Mapping[str, str]) -> str:
    return (
        f"the model's chat template leaves out or changes the text of the {message['role']} message "
        f"({message['content'][:_SHOWN_CHARACTERS]!r}): put it where the template takes it, or correct the template"
    )


def _warn_of_openings(tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> None:
    """Warn once of a template after which completions begin differently from what users expect."""
    if tag := _OPENING_TAG.search(text):
        warn_once(
            tokenizer, f"begins the answer itself with <{tag[1]}>: completions and the texts of rewards begin after it"
        )
    key = (str(tokenizer.name_or_path), template)
    if key in _warned:
        return
    _warned.add(key)
    question, answer = [{"role": "user", "content": _SENTINEL}], _SAID
    try:
        asked, bare = (_apply(question, tokenizer, template, is_prompt) for is_prompt in (True, False))
        full = _apply([*question, {"role": "assistant", "content": answer}], tokenizer, template, is_prompt=False)
    except Exception:  # the template takes no such conversation; only the data's conversations matter
        return
    before = full[len(asked) :].partition(answer)[0] if full.startswith(asked) else ""
    if asked == bare and answer in full and before.strip():
        warn_once(
            tokenizer,
            f"ignores add_generation_prompt: the model has to write {before!r} itself, and rewards get it as a part of "
            "the completion",
        )


def warn_once(tokenizer: PreTrainedTokenizerBase, what: str, example: str = "") -> None:
    """Warn of a tokenizer's chat template, once in a process."""
    key = (str(tokenizer.name_or_path), what)
    if key not in _warned:
        _warned.add(key)
        log.warning("the chat template of %r %s%s", tokenizer.name_or_path, what, example)
