"""How a chat template continues a conversation after tools or a user have answered, and how its model writes calls.

What a model sampled is never decoded and encoded again. What an answer adds is read off two renderings of a made-up
conversation, with the answer and without it: the tokens between the end of the model's turn and the beginning of its
next one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .call_formats import MARKS, READERS, Call, Tools, call_of
from .plain import exception_line
from .templates import literal, render_conversation, template_of, warn_once

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CALL_ID = "call00000"
"""Mistral's templates ask for nine letters and digits."""
_SENTINEL = "qzxanswerqzx"
_QUESTION: dict[str, Any] = {"role": "user", "content": "Go on."}
_SAID = "qzxsaidqzx"
_TOOLS = "{%- set tools = "
"""Begins the first line of a template that knows its tools."""
_KEPT = 256
"""Answers whose tokens are kept: games answer the same again and again, and two renderings take half a millisecond."""
_THOUGHTS: tuple[dict[str, str], ...] = ({}, {"reasoning_content": "qzxthoughtqzx"})
"""What a made-up turn of the model has besides its calls. Qwen3's templates put an empty thought into a turn without
one as long as it is the last; they keep the thoughts of others until the user speaks again."""


@dataclass(frozen=True)
class Answer:
    """What one of a turn's calls gave."""

    name: str
    text: str


def with_tools(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template that knows the tools (JSON schemas), for rendering prompts."""
    if not schemas:
        return tokenizer
    changed, names = copy.copy(tokenizer), [schema["function"]["name"] for schema in schemas]
    changed.chat_template = f"{_TOOLS}{literal(list(schemas))} -%}}\n{template_of(tokenizer, 'tool_use')}"
    shown = render_conversation([_QUESTION], changed, None, is_prompt=True)
    if missing := [name for name in names if name not in shown]:
        warn_once(tokenizer, f"does not show {', '.join(missing)} to the model: it has to know its tools by itself")
    return changed


class ToolTurns:
    """Reads calls off a turn, and gives the tokens that tools' answers add after it, or a user's."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], tools: Tools,
        template_date: str | None = None, call_format: str = "auto", *, has_users: bool = False,
    ) -> None:  # fmt: skip
        """`tokenizer` knows the `tools`, if there are any; `end_ids` end a turn; `has_users` says that messages of a
        user follow turns without calls. Raises ValueError where the template cannot be continued with the answers, or
        nobody knows how the model writes calls."""
        self._tokenizer, self._date = tokenizer, template_date
        ends = zip(tokenizer.convert_ids_to_tokens(list(end_ids)), end_ids, strict=True)
        self._ends = {token: number for token, number in ends if token}  # a model may have more than its tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._specials = [str(token) for token in added if token.special and len(str(token)) > 1]
        self._read: Callable[[str], list[Call]] = lambda _: []
        self._takes_several = True
        self._ids_of_answers = lru_cache(_KEPT)(self._rendered_answers)
        if tools:
            self._read = _reader(tokenizer, call_format, tools)
            if _SENTINEL not in self._after_calls([Answer("tool", _SENTINEL)])[1]:
                raise ValueError(f"the chat template of {tokenizer.name_or_path!r} leaves out what a tool answers: use "
                                 "one that shows it")  # fmt: skip
            self._require_readable_calls()
            self._takes_several = self._shows_names_of_several()
        if has_users and _SENTINEL not in self._after_words([{"role": "user", "content": _SENTINEL}])[1]:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} leaves out what a user says after the model, as "
                "those do that take a text as a list of parts alone: use one that shows it"
            )

    def calls(self, text: str) -> list[Call]:
        """The calls in the text of a turn, in order; what begins as a call and is none has a `problem`, and so have
        several calls where the template takes one a turn."""
        calls = self._read(text.rpartition("</think>")[2])  # a thought about a call is none
        if len(calls) > 1 and not self._takes_several:
            return [Call(calls[0].name, {}, "several calls in a turn: make one, and wait for its result")]
        return calls

    def answer_ids(self, answers: Sequence[Answer], *, is_open: bool = False) -> list[int]:
        """Token ids from the end of the model's turn to the beginning of its next, with a turn's answers in order; for
        a turn that `is_open`, whose end token was not sampled, that token too.

        An answer that spells a special token gets a space into it: no tool may end a turn or begin another. Raises
        ValueError where the template refuses the answers.
        """
        return list(self._ids_of_answers(tuple(answers), is_open))

    def user_ids(self, messages: Sequence[dict[str, str]], *, is_open: bool = False) -> list[int]:
        """Token ids from the end of a turn without calls to the beginning of the model's next, with messages between.

        What holds for answers of tools holds for the messages.
        """
        texts = [{**each, "content": self.without_specials(each["content"])} for each in messages]
        return self._ids(self._after_words(texts), is_open)

    def _rendered_answers(self, answers: tuple[Answer, ...], is_open: bool) -> list[int]:
        texts = [Answer(each.name, self.without_specials(each.text)) for each in answers]
        return self._ids(self._after_calls(texts), is_open)

    def _ids(self, between: tuple[str, str], is_open: bool) -> list[int]:
        end, text = between
        # after a token, as in the row: some tokenizers put a space before a text that begins, some tokens take white
        # space after them
        before = end or self._tokenizer.eos_token
        ids: list[int] = self._tokenizer(before + text, add_special_tokens=False)["input_ids"]
        place = ids.index(self._ends[end] if end else self._tokenizer.eos_token_id)
        return ids[place:] if end and is_open else ids[place + 1 :]

    def _after_words(self, messages: Sequence[dict[str, str]]) -> tuple[str, str]:
        turn = {"role": "assistant", "content": _SAID}
        return self._between(turn, _SAID, messages, "messages of a user after the model's")

    def _after_calls(self, answers: Sequence[Answer]) -> tuple[str, str]:
        turn = _calling([Call(each.name, {}) for each in answers])
        answered = [{"role": "tool", "name": each.name, "tool_call_id": CALL_ID, "content": each.text}
                    for each in answers]  # fmt: skip
        return self._between(turn, answers[-1].name, answered, "answers of tools")

    def _between(
        self, turn: dict[str, Any], last: str, following: Sequence[dict[str, Any]], what: str
    ) -> tuple[str, str]:
        """What ends the model's `turn`, whose `last` words are given, and the text from there to the beginning of its
        next."""
        name = self._tokenizer.name_or_path
        for thought in _THOUGHTS:
            asked = [_QUESTION, turn | thought]
            try:
                before = self._rendered(asked, is_prompt=False)
                after = self._rendered([*asked, *following], is_prompt=True)
            except Exception as error:  # a template is a program, and may raise what it likes
                raise ValueError(f"the chat template of {name!r} takes no {what} ({error}): use a model whose template "
                                 "does") from error  # fmt: skip
            turn_end, end = self._end_of(before, last)
            if after.startswith(before[:turn_end]):
                text = after[turn_end:]
                # a turn of GLM ends with the token that begins the next message
                begin = next((each for each in self._ends if not end and text.startswith(each)), "")
                return end or begin, text.removeprefix(begin)
        raise ValueError(
            f"the chat template of {name!r} writes earlier turns anew before {what}, so that the tokens that were "
            "sampled are no part of the conversation any more: use a template that only appends"
        )

    def _rendered(self, messages: Sequence[dict[str, Any]], *, is_prompt: bool) -> str:
        return render_conversation(messages, self._tokenizer, self._date, is_prompt=is_prompt)

    def _end_of(self, text: str, last: str) -> tuple[int, str]:
        """Where the model's turn ends whose last words are given, which is behind the token that ends it, and that
        token; it is empty where the template closes no turn."""
        place = text.rfind(last)
        ends = [(text.rfind(end) + len(end), end) for end in self._ends if text.rfind(end) > place]
        return max(ends, default=(len(text), ""))

    def _require_readable_calls(self) -> None:
        """Raise ValueError where a call that the template itself writes is not read as one."""
        call = Call("qzxtoolqzx", {"a": 1})
        prompt = self._rendered([_QUESTION], is_prompt=True)
        text = self._rendered([_QUESTION, _calling([call])], is_prompt=False)
        if call.name not in text:  # the template does not write calls
            return
        turn_end, end = self._end_of(text, call.name)
        # the prompt may begin a thought that the template writes otherwise, or not at all, where there is none
        begin = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
        turn = text[begin:turn_end].removesuffix(end)
        if self._read(turn) != [call]:
            raise ValueError(
                f"environment.call_format: the chat template of {self._tokenizer.name_or_path!r} writes a call as "
                f"{turn!r}, which would not be read as one: give another of {', '.join(READERS)}, or give the "
                "tokenizer a response_schema"
            )

    def _shows_names_of_several(self) -> bool:
        """Whether the template takes several calls in a turn: some refuse them, some write only the first."""
        calls = [Call(f"qzxtool{n}qzx", {}) for n in range(2)]
        try:
            text = self._rendered([_QUESTION, _calling(calls)], is_prompt=False)
        except Exception:  # as above
            return False
        return (calls[0].name in text) == (calls[1].name in text)

    def without_specials(self, text: str) -> str:
        """The text with a space in what spells a special token: who is no template ends no turn and begins none."""
        for token in self._specials:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _calling(calls: Sequence[Call]) -> dict[str, Any]:
    """A message of the model that makes some calls."""
    return {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": CALL_ID, "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]}  # fmt: skip


def _reader(tokenizer: PreTrainedTokenizerBase, call_format: str, tools: Tools) -> Callable[[str], list[Call]]:
    """How calls are read; raises ValueError where that is not known."""
    if call_format != "auto":
        return lambda text: READERS[call_format](text, tools)
    if getattr(tokenizer, "response_schema", None):
        return lambda text: _parsed(tokenizer, text)
    template = template_of(tokenizer, "tool_use")
    if template.startswith(_TOOLS):  # the tools' schemas say nothing of the model
        template = template.partition("\n")[2]
    if found := [name for name, mark in MARKS.items() if mark in template]:
        return lambda text: READERS[found[0]](text, tools)
    raise ValueError(
        f"environment.call_format: nothing in the chat template of {tokenizer.name_or_path!r} says how its model calls "
        f"tools; give one of {', '.join(READERS)}, or a model whose template knows tools"
    )


def _parsed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Call]:
    """By the tokenizer's own schema of responses."""
    try:
        message = tokenizer.parse_response(text)
        return [call_of(each.get("function", each)) for each in message.get("tool_calls") or []]
    except Exception as error:  # what it raises, and what it returns, depends on the schema
        problem = exception_line(error)
        return [Call("", {}, problem.encode(errors="replace").decode())]  # it may quote half a character
