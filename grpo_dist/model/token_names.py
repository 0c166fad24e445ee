"""Tokens and texts that rollouts name, by the files of a tokenizer alone.

Imports neither torch nor transformers, so that the answer comes at once. What is refused here would be refused with the
loaded tokenizer too, by the same words; `rollout/sampling.py` refuses the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.checks import require
from ..config.rollout import RolloutConfig
from .files import read_entries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FRAME = ("bos_token", "eos_token", "pad_token")
"""Entries of tokenizer_config.json for tokens that only frame a text."""


def require_known_tokens(rollout: RolloutConfig, place: Path, model: Path) -> None:
    """Raise ValueError for banned tokens that are none, and for stop texts that cannot occur, where the tokenizer's
    directory `place` has a tokenizer.json; `model` is the directory with the model's config.json."""
    if not (rollout.banned_tokens or rollout.stop) or not (place / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_truncation()  # transformers sets both for each call; a file may have those of its training
    tokenizer.no_padding()
    entries = read_entries(place, "tokenizer_config.json") or {}
    added = {each["content"]: int(number) for number, each in (entries.get("added_tokens_decoder") or {}).items()}
    banned = _banned(rollout.banned_tokens, tokenizer, added)
    frame = {name: each["content"] if isinstance(each := entries.get(name), dict) else each for name in FRAME}
    ids = {name: number for name, token in frame.items()
           if token and (number := added.get(token, tokenizer.token_to_id(token))) is not None}  # fmt: skip
    if "eos_token" in ids and (of_model := _ends(model)):
        ends = {ids["eos_token"], *of_model}
        require_an_end(rollout, ends, banned)
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        _require_stops(rollout.stop, tokenizer, {*ids.values()} | (ends & special))


def require_an_end(rollout: RolloutConfig, end_ids: set[int], banned: set[int]) -> None:
    """Raise ValueError where nothing can end a completion but its length: all of `end_ids` are `banned`."""
    require(not end_ids <= banned or bool(rollout.stop), "rollout.banned_tokens", rollout.banned_tokens,
            f"a token that may end a completion ({sorted(end_ids)}), or rollout.stop")  # fmt: skip


def require_occurring(occurs: bool, stop: str, tokens: Sequence[str]) -> None:
    """Raise ValueError where a stop text does not occur in the text of the `tokens` that it is made of."""
    require(occurs, "rollout.stop", stop, "a text that occurs in completions: the tokenizer makes "
            f"{list(tokens)} of `a{stop}`, and the texts that rewards get leave out the tokens that only end a "
            "completion, which end it anyway")  # fmt: skip


def token_id(token: int | str, size: int, known: int | None, split: Callable[[str], Sequence[tuple[str, int]]]) -> int:
    """The id of a banned token, of a tokenizer with `size` of them, in which it has the id `known`, or else `split`
    makes (token, id) of it. Raises ValueError where it is no single token."""
    if isinstance(token, int):
        require(0 <= token < size, "rollout.banned_tokens", token, f"an id from 0 to {size - 1}")
        return token
    if known is not None:
        return known
    parts = split(token)
    require(len(parts) == 1, "rollout.banned_tokens", token, "a text of one token: the tokenizer makes "
            f"{[each for each, _ in parts]} of it")  # fmt: skip
    return parts[0][1]


def _banned(tokens: Sequence[int | str], tokenizer: Tokenizer, added: Mapping[str, int]) -> set[int]:
    size = max(tokenizer.get_vocab_size(), *(number + 1 for number in added.values()), 0)

    def split(text: str) -> list[tuple[str, int]]:
        """The fewest tokens that a tokenizer with these makes: some put a space before a text."""
        encoded = min((tokenizer.encode(each, add_special_tokens=False) for each in (text, f" {text}")),
                      key=lambda each: abs(len(each.ids) - 1))  # fmt: skip
        return list(zip(encoded.tokens, encoded.ids, strict=True))

    return {token_id(token, size, None if isinstance(token, int) else added.get(token, tokenizer.token_to_id(token)),
                     split) for token in tokens}  # fmt: skip


def _require_stops(stops: Sequence[str], tokenizer: Tokenizer, left_out: set[int]) -> None:
    for stop in stops:
        encoded = tokenizer.encode(f"a{stop}", add_special_tokens=False)
        kept = [number for number in encoded.ids if number not in left_out]
        require_occurring(stop in tokenizer.decode(kept, skip_special_tokens=False), stop, encoded.tokens)


def _ends(model: Path) -> set[int]:
    """The ends of a completion that a model's files name."""
    entries = read_entries(model) or {}
    ends: set[int] = set()
    for part in (read_entries(model, "generation_config.json") or {}, entries, entries.get("text_config") or {}):
        given = part.get("eos_token_id")
        ends |= set(given if isinstance(given, list) else [given]) - {None}
    return ends
