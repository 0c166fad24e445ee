"""From token ids to the text that rewards, tables and users see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
