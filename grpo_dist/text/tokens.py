"""From token ids to the text that rewards, tables and users see."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

_MOST_TOKENS_OF_A_CHARACTER = 4
_BROKEN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTED_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""The bytes that a byte-level vocabulary (GPT-2) writes as the character of the same number; the others come, in order,
from 256 on."""

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
_BYTE_OF = {chr(byte): byte for byte in _PRINTED_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTED_BYTES}))
}


class CompletionTexts:
    """Decodes completions: all sampled tokens, except those that only frame a text.

    The tokenizer's tokens for beginning, end and padding are left out, and so are further special tokens that end a
    completion. Other special tokens stay: `<think>` or `<tool_call>` may be one, and rewards may look for it. White
    space stays as the tokens spell it; but the messages of SentencePiece's tokenizers begin without their space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        """`end_ids` are the tokens that end a completion; texts keep those that are not special."""
        self._tokenizer = tokenizer
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._left_out = frame | (special & set(end_ids))
        self._shown = {*tokenizer.get_vocab().values()} - self._left_out  # a model may have more tokens than these
        self._begin: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        (self._begun,) = self._decoded([self._begin])

    def __call__(self, rows: Sequence[Sequence[int]], *, goes_on: bool = False) -> list[str]:
        """Return the text of each row of token ids: as a message, or as what `goes_on` after a text."""
        shown = [[number for number in row if number in self._shown] for row in rows]
        return self._continued(shown) if goes_on else self._decoded(shown)

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        """The text of each row as its tokens spell it."""
        return self._tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )

    def _continued(self, rows: list[list[int]]) -> list[str]:
        """The text of each row as its tokens spell it after a text."""
        texts = self._decoded([[*self._begin, *row] for row in rows])
        return [text.removeprefix(self._begun) for text in texts]

    def spelled(self) -> list[bytes]:
        """The bytes that each token of the vocabulary adds to a text which has begun, by its id; none for tokens that
        texts leave out."""
        size = len(self._tokenizer)
        added = self._continued([[number] for number in range(size)])
        tokens = self._tokenizer.convert_ids_to_tokens(list(range(size)))
        spelled = [_bytes_of(token) if _BROKEN in text else text.encode()
                   for token, text in zip(tokens, added, strict=True)]  # fmt: skip
        return [b"" if number in self._left_out else each for number, each in enumerate(spelled)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, special or not. A character of several tokens is the first one's; the others have
        none."""
        pieces: list[str] = []
        begins = 0  # of a character that is not complete

        def text(first: int, last: int) -> str:
            return self._continued([list(ids[first:last])])[0]

        for place in range(len(ids)):
            alone, joined = text(place, place + 1), text(begins, place + 1)
            if _BROKEN not in alone and begins < place:
                pieces += [text(begins, place), *[""] * (place - begins - 1), alone]
            elif joined.endswith(_BROKEN) and place + 1 - begins < _MOST_TOKENS_OF_A_CHARACTER and place + 1 < len(ids):
                continue
            else:
                pieces += [joined, *[""] * (place - begins)]
            begins = place + 1
        return pieces


def _bytes_of(token: str) -> bytes:
    """The bytes of a token that is no text by itself, as its vocabulary writes it."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return bytes(map(_BYTE_OF.__getitem__, token)) if {*token} <= _BYTE_OF.keys() else token.encode()


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, such as a BOS, and those that it puts behind it."""
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for begin in range(len(framed) - len(bare) + 1):
        if framed[begin : begin + len(bare)] == bare:
            return framed[:begin], framed[begin + len(bare) :]
    return [], []


def begun_once(row: list[int], before: list[int]) -> list[int]:
    """The tokens of a text without those that a tokenizer has put `before` it, where it began with them itself."""
    return row[len(before) :] if before and row[len(before) : 2 * len(before)] == before else row
