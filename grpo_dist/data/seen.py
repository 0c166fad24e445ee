"""What a model sees of the prompts of a data set: whether they differ, and whether tokens spell their texts."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.schema import DataConfig
from ..text.plain import visible
from ..text.templates import template_of
from ..types import Prompt

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 200
_SHOWN_EXAMPLES = 8
_PROMPTS_AT_ONCE = 1024  # whose tokens are written out as texts


def check_seen(path: str, prompts: Sequence[Prompt], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of characters that a model does not see, and of texts that it takes for the frame of a conversation.

    Raises ValueError where prompts of different texts all have the same tokens.
    """
    _require_distinct(path, prompts, config)
    whole = [each for each in prompts if config.too_long != "truncate" or len(each.ids) < config.max_prompt_length]
    lost: list[list[str]] = []
    for start in range(0, len(whole), _PROMPTS_AT_ONCE):
        part = whole[start : start + _PROMPTS_AT_ONCE]
        ids = [prompt.ids for prompt in part]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lost += [[*(_letters(prompt.text) - _letters(text))] for prompt, text in zip(part, texts, strict=True)
                 if text != prompt.text]  # fmt: skip
    _warn(path, len(prompts), lost, "have characters that the tokenizer does not write, so that the model does not see "
          "them")  # fmt: skip
    if any(prompt.messages for prompt in prompts) and (frame := _frame(tokenizer)):
        spelled = [[token for message in prompt.messages or [] if message["role"] != "assistant"
                    for token in frame.findall(message["content"])] for prompt in prompts]  # fmt: skip
        _warn(path, len(prompts), spelled, "have messages that spell special tokens of the chat template, so that the "
              "model takes them for the beginning or end of a turn")  # fmt: skip


def _require_distinct(path: str, prompts: Sequence[Prompt], config: DataConfig) -> None:
    first = prompts[0]
    if any(prompt.ids != first.ids for prompt in prompts):
        return
    if any((prompt.text, prompt.messages) != (first.text, first.messages) for prompt in prompts):
        cut = f" (data.too_long: truncate keeps the last {config.max_prompt_length})"
        raise ValueError(
            f"{path}: all {len(prompts)} prompts have the same {len(first.ids)} tokens, although their "
            f"texts differ{cut if config.too_long == 'truncate' else ''}: {first.text[-_SHOWN_CHARACTERS:]!r}; look at "
            "the chat template and the tokenizer"
        )


def _letters(text: str) -> Counter[str]:
    """How often each character is in a text, whatever its case and its form in Unicode; spaces do not count."""
    return Counter("".join(unicodedata.normalize("NFKC", text).casefold().split()))


def _frame(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the special tokens that the chat template writes, and the tokenizer's own ends of a text."""
    template, ends = template_of(tokenizer), {tokenizer.bos_token, tokenizer.eos_token}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    framing = [re.escape(token) for token in special if token in ends or (len(token) > 1 and token in template)]
    return re.compile("|".join(framing)) if framing else None


def _warn(path: str, num_prompts: int, examples: Sequence[Sequence[str]], what: str) -> None:
    """Warn of prompts for which there are examples of a problem."""
    if count := sum(map(bool, examples)):
        common = Counter(each for row in examples for each in sorted({*row})).most_common(_SHOWN_EXAMPLES)
        shown = ", ".join(repr(visible(each)) for each, _ in common)
        log.warning("%s: %d of %d prompts %s: %s", path, count, num_prompts, what, shown)
