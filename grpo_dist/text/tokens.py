"""From token ids to the text that rewards, tables and people see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CompletionTexts:
    """Decodes completions: everything that was sampled, but for the tokens that only frame a text.

    Left out are the tokenizer's beginning, end and padding, and further special tokens that end a completion. Other
    special tokens stay: `<think>` or `<tool_call>` may be one, and a reward that asks for it has to see it. White space
    is left as the tokens spell it.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        """`end_ids` are the tokens that end a completion; of these, texts keep the ones that are not special."""
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
