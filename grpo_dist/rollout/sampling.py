"""Sampling by counters alone: the same completion is drawn on whatever rank and in whatever batch it lands.

Each completion owns a 64-bit key made of (seed, step, prompt, sample); the noise of its token at position t is one
uniform number, a hash of (key, t). The token is read off the cumulative distribution at that number, so a step costs
one pass over the vocabulary and no random state exists that a checkpoint would have to hold. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..algorithm.hashing import uniforms
from ..config.rollout import RolloutConfig, truncates
from ..distributed.transfer import to_device
from ..model.token_names import require_an_end, require_occurring, token_id
from ..text.tokens import CompletionTexts
from .stop import Matching, StopStrings, stop_strings

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed at once."""
AT_ONCE = 1 << 20
"""Most logits on a CPU of rows that are drawn from at once: what is made of them stays in the processor's caches."""
UNITS = 2.0**40
"""Parts of the likeliest token's probability in which a nucleus is weighed. Sums of integers do not depend on the order
in which they are made, so that every engine finds the same nucleus."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and what ends a trajectory besides the ids that the engine knows."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    greedy: bool = False
    """Take the likeliest token that may be drawn; top_p, top_k and min_p are then without effect."""
    banned: tuple[int, ...] = ()
    """Ids that are never drawn."""
    min_new_tokens: int = 0
    """So many tokens of a trajectory do not end it: ids that would are not drawn, and stop strings do not count."""
    stop: StopStrings | None = None

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out of the distribution that is drawn from, besides banned ones."""
        return truncates(self.top_p, self.top_k, self.min_p)

    def ends(self, ids: Sequence[int], offset: int, end_ids: Sequence[int]) -> bool:
        """Whether the last of `ids`, before which the trajectory has `offset` tokens, ends it by itself."""
        return ids[-1] in end_ids or self.stopped_at(ids, offset) == len(ids)

    def stopped_at(self, ids: Sequence[int], offset: int) -> int | None:
        """How many of `ids` there are with the first one that completes a stop string; None where none does."""
        return None if self.stop is None else self.stop.first(ids, self.min_new_tokens - offset)


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """The numbers of a config's sampling; `sampling_with` adds what only a tokenizer knows."""
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)


def sampling_with(
    rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], model_config: PreTrainedConfig
) -> Sampling:
    """How a config has completions drawn by a model with this config and tokenizer.

    Raises ValueError for banned tokens that are none, and for stop strings that cannot occur.
    """
    banned = tuple(sorted({_token_id(token, tokenizer) for token in rollout.banned_tokens}))
    require_an_end(rollout, set(end_ids), set(banned))
    sampling = replace(sampling_of(rollout), banned=banned, min_new_tokens=rollout.min_new_tokens)
    if not rollout.stop:
        return sampling
    spelled = CompletionTexts(tokenizer, end_ids).spelled()
    stop = stop_strings(rollout.stop, [*spelled, *[b""] * (model_config.get_text_config().vocab_size - len(spelled))])
    for text in rollout.stop:
        ids = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"]
        require_occurring(stop.first(ids) is not None, text, tokenizer.convert_ids_to_tokens(ids))
    return replace(sampling, stop=stop)


def _token_id(token: int | str, tokenizer: PreTrainedTokenizerBase) -> int:
    def split(text: str) -> list[tuple[str, int]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))

    known = tokenizer.get_vocab().get(token) if isinstance(token, str) else None
    return token_id(token, len(tokenizer), known, split)


class Rules:
    """What of a Sampling depends on a request's tokens, in place on a device: which may be drawn, and which end it.

    A place is the number of the trajectory's tokens before a token.
    """

    def __init__(self, sampling: Sampling, end_ids: Sequence[int], device: torch.device) -> None:
        ids = [torch.tensor(list(each), dtype=torch.int64) for each in (end_ids, sampling.banned)]
        self.ends, self._banned = to_device(ids, device)
        self.least = sampling.min_new_tokens
        self._bans_of: Tensor | None = None
        self._matching = None if sampling.stop is None else Matching(sampling.stop, device)

    def grow(self, count: int) -> None:
        """Take in `count` requests more."""
        if self._matching is not None:
            self._matching.grow(count)

    def restart(self, request: Tensor) -> None:
        """Forget the tokens of each `request` (R,) that came so far."""
        if self._matching is not None:
            self._matching.restart(request)

    def ended(self, tokens: Tensor, request: Tensor, places: Tensor) -> Tensor:
        """Whether the newest `tokens` (R,) of each `request` (R,), at `places` (R,), end it: (R,) bool."""
        # torch.isin sorts where there are many ends, and the sizes of what it sorts make the host wait for a GPU
        over = (tokens[:, None] == self.ends).any(-1)
        if self._matching is None:
            return over
        return over | (self._matching.step(tokens, request) & (places >= self.least))

    @property
    def matches(self) -> bool:
        """Whether there are stop strings."""
        return self._matching is not None

    @property
    def bans(self) -> bool:
        """Whether some token may not be drawn somewhere."""
        return bool(len(self._banned)) or self.least > 0

    def bans_of(self, size: int) -> Tensor:
        """Of each of `size` tokens where it may not be drawn, (V,) int8: 0 nowhere, 1 before `least` tokens, 2
        anywhere."""
        if self._bans_of is None:
            bans = torch.zeros(size, dtype=torch.int8, device=self.ends.device)
            self._bans_of = bans.index_fill_(0, self.ends, 1).index_fill_(0, self._banned, 2)
        return self._bans_of

    def possible(self, logits: Tensor, places: Tensor) -> Tensor:
        """`logits` (B, V) of the tokens that may be drawn at `places` (B,): -inf for the others."""
        if not self.bans:
            return logits
        kept = logits.index_fill(1, self._banned, -torch.inf)
        if self.least:
            early = (places < self.least)[:, None]
            kept[:, self.ends] = kept[:, self.ends].masked_fill(early, -torch.inf)
        return kept


def allowed(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """Which tokens may be drawn: (B, V) bool, or None for all of them.

    `logits` (B, V) float32, of the sampling temperature; a constant may be added to those of a row. Top-p is a share of
    the mass that top-k leaves, and min-p is judged by the likeliest token, as in transformers. With top-p a token stays
    if the tokens that are likelier than it have less than that mass, and with top-k if they are fewer than that: tokens
    of the same logit all stay, or none.
    """
    keep = kth = None
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        keep = logits >= kth
    if sampling.min_p > 0:
        likely = logits >= logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        keep = likely if keep is None else keep & likely
    if sampling.top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        masses = ((ordered - ordered[..., :1]).exp_() * UNITS).long()
        running = (masses if kth is None else masses * (ordered >= kth)).cumsum_(-1)
        # in float32, as a kernel of a GPU takes it
        most = (running[..., -1:].double() * torch.tensor(sampling.top_p, dtype=torch.float32)).ceil().long()
        last = torch.searchsorted(running, most).clamp(max=running.shape[-1] - 1)
        nucleus = logits >= ordered.gather(-1, last)
        keep = nucleus if keep is None else keep & nucleus
    return keep


def draw(
    logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, rules: Rules | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    `logits` (B, V), `keys` and `positions` (B,) int64; `rules` are those of the sampling, None for one without bans.
    Returns token ids (B,) int64 and their log-probabilities (B,) float32 under the untruncated distribution at the
    sampling temperature, which is what the trainer computes too. Tokens are banned before the others are truncated.
    """
    rows = max(1, AT_ONCE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), positions.split(rows), uniforms(keys, positions).split(rows), strict=True)
    drawn = [_draw(part, places, u, sampling, rules) for part, places, u in parts]
    tokens, logprobs = (torch.cat(each) for each in zip(*drawn, strict=True))
    return tokens, logprobs


def _draw(
    logits: Tensor, positions: Tensor, u: Tensor, sampling: Sampling, rules: Rules | None
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    weights, peak = _weights(logits)
    blocks, sums = _blocks(weights)
    total = sums.sum(-1, keepdim=True)
    possible = logits if rules is None else rules.possible(logits, positions)
    if sampling.greedy:
        tokens = possible.argmax(-1, keepdim=True)
    else:
        keep = allowed(possible, sampling)
        if possible is not logits:
            weights, _ = _weights(possible)
        if keep is not None:
            weights *= keep
        if keep is not None or possible is not logits:
            blocks, sums = _blocks(weights)
        tokens = _inverse_cdf(blocks, sums, u)
    logprobs = logits.gather(-1, tokens) - peak - total.log()
    return tokens[:, 0], logprobs[:, 0].float()


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Unnormalised probabilities of logits (B, V), and the largest logit of each row (B, 1)."""
    peak = logits.amax(-1, keepdim=True)
    return (logits - peak).exp_(), peak


def _blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, V) by blocks (B, K, BLOCK), zeros behind the last one, and the blocks' sums (B, K) float64."""
    size = weights.shape[-1]
    padded = pad(weights, (0, -size % BLOCK)) if size % BLOCK else weights
    blocks = padded.view(len(weights), -1, BLOCK)
    return blocks, blocks.sum(-1).double()


def _inverse_cdf(blocks: Tensor, sums: Tensor, u: Tensor) -> Tensor:
    """The token at which the running sum of unnormalised probabilities passes `u` (B,) of its total: (B, 1) int64.
    Probabilities and their sums are those of `_blocks`.

    Running sums are float64, but only those of blocks and of the one block that is hit exist: one over a large
    vocabulary would be most of what sampling costs. A token of probability 0 is never returned.
    """
    cumulative = sums.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    chosen = _first_above(cumulative, sums, target)
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK))[:, 0].double()
    running = inside.cumsum(-1)
    # as a share of the block, because its sum was rounded in float32
    share = (target - (cumulative - sums).gather(1, chosen)) / sums.gather(1, chosen)
    return chosen * BLOCK + _first_above(running, inside, share * running[:, -1:])


def _first_above(cumulative: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """The first place where the running sum of `parts` (B, K) is above `target` (B, 1), as (B, 1); its part is above 0.

    A target that rounding has put at the total or beyond is answered with the last such part.
    """
    places = torch.arange(parts.shape[1], device=parts.device)
    last = torch.where(parts > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
