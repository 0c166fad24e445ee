"""From token ids to the text that rewards, tables and users see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MOST_TOKENS_OF_A_CHARACTER = 4
_BROKEN = "\ufffd"


class CompletionTexts:
    """Decodes completions: all sampled tokens, except those that only frame a text.

    The tokenizer's tokens for beginning, end and padding are left out, and so are further special tokens that end a
    completion. Other special tokens stay: `<think>` or `<tool_call>` may be one, and rewards may look for it. White
    space stays as the tokens spell it.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        """`end_ids` are the tokens that end a completion; texts keep those that are not special."""
        self._tokenizer = tokenizer
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._left_out = frame | (special & set(end_ids))

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids."""
        kept = [[number for number in row if number not in self._left_out] for row in rows]
        return self._tokenizer.batch_decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, special or not. A character of several tokens is the first one's; the others have
        none."""
        pieces: list[str] = []
        begins = 0  # of a character that is not complete

        def text(first: int, last: int) -> str:
            return self._tokenizer.decode(
                ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

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
