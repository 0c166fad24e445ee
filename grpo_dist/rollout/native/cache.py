"""Keys and values of everything in flight, and the attention of a decoding step over them.

Keys and values of a prompt are stored once, whatever the size of its group; each sequence adds only its own. A step of
decoding attends to both parts apart and joins them under one softmax (the partial results are weighted by their sums
of exponentials, as in FlashAttention, arXiv:2205.14135, section 3.1). Prompts so short that a second attention costs
more than it saves are copied to every sequence instead, in front of its own tokens.

Shapes: R sequences in flight, P prompts in flight, Lp the longest of them, S slots of each sequence, Hq query heads,
Hk key heads, G = Hq / Hk, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...model.attention import RowLayout
from ...model.block_attention import cap_scores
from ...model.layout import AttentionOptions
from ...model.shared_prefix import with_sinks

EVERYTHING = 1 << 30
"""Positions of a window that no sequence leaves."""
SLOT_CHUNK = 32
"""Slots for tokens are added this many at a time."""


Store = dict[int, Tensor]
"""Keys or values by layer."""


class Prefilled(Protocol):
    """Prompts that were computed."""

    lengths: list[int]

    def by_prompt(self) -> tuple[Store, Store]:
        """Their keys and values (P, Hk, Lp, D), zeros behind the shorter prompts."""


class PrefillLayout:
    """A row of whole prompts that keeps the keys and values it sees."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.rows = RowLayout([(length, []) for length in lengths], device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def by_prompt(self) -> tuple[Store, Store]:
        """See `Prefilled`."""
        if not self.keys:
            raise ValueError("the model's attention never came to the layout it was given")
        keys, values = ({layer: _padded(row.split(self.lengths, 1)) for layer, row in rows.items()}
                        for rows in (self.keys, self.values))  # fmt: skip
        return keys, values

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `layout.Layout`."""
        if layer in self.keys:
            raise ValueError(f"layer {layer} attends more than once")
        self.keys[layer], self.values[layer] = key[0], value[0]
        return self.rows.attend(layer, query, key, value, options)


@dataclass
class PrefilledRows:
    """Prompts of which each was computed in a row of its own."""

    lengths: list[int]
    keys: Store
    values: Store

    def by_prompt(self) -> tuple[Store, Store]:
        """See `Prefilled`."""
        return self.keys, self.values


class DecodeState:
    """The cache of R sequences and their P prompts, which is also the layout of a decoding step.

    While `version` stays the same no tensor is exchanged and, with whole chunks, no size changes; and a step reads
    nothing back from the device. It can be captured once and replayed.
    """

    def __init__(self, device: torch.device, most_tokens: int, *, shares: bool, whole_chunks: bool) -> None:
        """`most_tokens` is the most that can be sampled for a sequence; `shares` keeps a prompt once for its sequences.
        With `whole_chunks` a step attends to all slots there are, so that its sizes change only every chunk."""
        self.device, self.most_tokens, self.shares, self.whole_chunks = device, most_tokens, shares, whole_chunks
        self.prompt_keys: dict[int, Tensor] = {}  # layer -> (P, Hk, Lp, D)
        self.prompt_values: dict[int, Tensor] = {}
        self.own_keys: dict[int, Tensor] = {}  # layer -> (R, Hk, S, D)
        self.own_values: dict[int, Tensor] = {}
        self.prompt_lengths = torch.zeros(0, dtype=torch.int64, device=device)  # (P,)
        self.prompt = torch.zeros(0, dtype=torch.int64, device=device)  # (R,) each sequence's prompt
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)  # (R,) sampled tokens in the cache
        self.longest = 0  # tokens of the longest sequence there may be
        self.used = 0  # the most slots that any sequence has filled, known without asking the device
        self.version = 0  # counts the exchanges of tensors
        self.computed: Tensor | None = None  # the rows of the step under way; None for all

    @classmethod
    def of_rows(cls, shape: tuple[int, int, int, int], layers: list[int], dtype: torch.dtype) -> DecodeState:
        """The cache, on a CPU, of rows without prompts: (R, Hk, S, D) zeros for each layer."""
        state = cls(torch.device("cpu"), shape[2], shares=False, whole_chunks=False)
        state.own_keys, state.own_values = ({n: torch.zeros(shape, dtype=dtype) for n in layers} for _ in range(2))
        state.prompt_lengths, state.prompt = torch.zeros(shape[0], dtype=torch.int64), torch.arange(shape[0])
        state.lengths = torch.zeros_like(state.prompt)
        state._place_rows()
        return state

    @property
    def num_rows(self) -> int:
        """Sequences in flight."""
        return len(self.prompt)

    def admit(self, prefilled: Prefilled, sizes: list[int]) -> Tensor:
        """Add prompts with `sizes` sequences each. Returns the new sequences' places among these prompts, int64."""
        first, lengths = len(self.prompt_lengths), prefilled.lengths
        keys, values = prefilled.by_prompt()
        own_prompt = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
        prompt_of_row = torch.tensor(own_prompt, device=self.device)
        for new, prompts, own in (
            (keys, self.prompt_keys, self.own_keys), (values, self.prompt_values, self.own_values),
        ):  # fmt: skip
            for layer, fresh in new.items():
                if self.shares:
                    prompts[layer] = _stacked(prompts.get(layer), fresh)
                    fresh = fresh[:, :, :0]
                own[layer] = _stacked(own.get(layer), fresh.index_select(0, prompt_of_row))
        self.prompt = torch.cat([self.prompt, first + prompt_of_row])
        self.prompt_lengths = torch.cat([self.prompt_lengths, torch.tensor(lengths, device=self.device)])
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(sum(sizes))])
        self.used = max(self.used, 0 if self.shares else max(lengths))
        self.longest = max(self.longest, max(lengths) + self.most_tokens)
        self._place_rows()
        return prompt_of_row

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows`, and the prompts nobody is left of."""
        alive, self.prompt = torch.unique(self.prompt[rows], return_inverse=True)
        self.lengths = self.lengths[rows]
        if len(alive) < len(self.prompt_lengths):
            self.prompt_lengths = self.prompt_lengths[alive]
            longest = int(self.prompt_lengths.max()) if len(alive) else 0
            for store in (self.prompt_keys, self.prompt_values):
                for layer in store:
                    store[layer] = store[layer][:, :, :longest].index_select(0, alive)
        for store in (self.own_keys, self.own_values):
            for layer in store:
                store[layer] = store[layer].index_select(0, rows)  # an index copies number by number
        self.used = 0
        if len(rows):
            self._place_rows()
            self.count_all()

    def _place_rows(self) -> None:
        """Settle where each sequence's sampled tokens begin and, where prompts are shared, its row in the blocks of
        queries: all of a prompt's sequences are one block."""
        self.version += 1
        lengths = self.prompt_lengths[self.prompt]
        self.starts = torch.zeros_like(lengths) if self.shares else lengths  # (R,) slot of the first sampled token
        self.most_used = int(self.starts.max()) + self.most_tokens
        self.rows = torch.arange(self.num_rows, device=self.device)
        if not self.shares:
            return
        counts = torch.bincount(self.prompt, minlength=len(self.prompt_lengths))
        self.block_rows = int(counts.max())  # of a block: as many as the prompt with most sequences has
        first = torch.cumsum(counts, 0) - counts
        self.row_in_blocks = self.prompt * self.block_rows + self.rows - first[self.prompt]
        self.blocks_are_full = self.num_rows == len(counts) * self.block_rows
        keys = next(iter(self.prompt_keys.values()))
        places = torch.arange(keys.shape[2], device=self.device)
        self.prompt_mask = _mask(places >= self.prompt_lengths[:, None], keys.dtype)  # (P, 1, 1, Lp)

    def make_room(self, tokens: int = 1) -> None:
        """Make room for so many more tokens of each sequence."""
        slots, most = next(iter(self.own_keys.values())).shape[2], min(self.used + tokens, self.most_used + 1)
        if most > slots:
            self.version += 1
            slots = min(max(slots + SLOT_CHUNK, slots * 3 // 2, most), self.most_used + 1)
            for store in (self.own_keys, self.own_values):
                for layer, tensor in store.items():
                    store[layer] = _with_slots(tensor, slots)
        self.seen = slots if self.whole_chunks else most

    def begin_step(self, computed: Tensor | None = None) -> None:
        """Lay out who attends to what; part of the step. `computed` are the rows it is for, None for all of them."""
        self.computed = computed
        self.slots = self.starts + self.lengths
        self._own_masks: dict[int | None, Tensor] = {}
        self._window_masks: dict[int, tuple[Tensor, Tensor]] = {}

    def own_mask(self, window: int | None) -> Tensor:
        """Additive mask (R, 1, 1, seen) of this step; made when it is first asked for."""
        if window not in self._own_masks:
            slots = torch.arange(self.seen, device=self.device)
            hidden = slots > self.slots[:, None]
            if window is not None:
                hidden |= slots <= self.slots[:, None] - window
            self._own_masks[window] = _mask(hidden, next(iter(self.own_keys.values())).dtype)
        return self._own_masks[window]

    def _window_mask(self, window: int, repeat: int) -> tuple[Tensor, Tensor]:
        """Additive mask (P, 1, block_rows · G, Lp) of the prompts for this step's queries of a layer with a window, and
        (R,) bool, whose windows have left their prompt behind. To these the mask shows one key: a query needs one."""
        if window not in self._window_masks:
            lengths = self.prompt_lengths[self.prompt]
            keys = next(iter(self.prompt_keys.values()))
            places = torch.arange(keys.shape[2], device=self.device)
            first = lengths + self.lengths - window + 1  # the first position that a row sees
            is_past = first >= lengths
            hidden = (places < torch.where(is_past, 0, first)[:, None]) | (places >= lengths[:, None])
            rows = torch.zeros(hidden.shape, dtype=keys.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            self._window_masks[window] = self._to_blocks(rows[:, None, None].repeat(1, 1, repeat, 1)), is_past
        return self._window_masks[window]

    def end_step(self) -> None:
        """Count the tokens that were added; part of the step. Ended rows write to the last slot over and over."""
        if self.computed is None:
            self.lengths.add_(1).clamp_(max=self.most_tokens)
        else:
            self.lengths[self.computed] += 1

    def set_lengths(self, rows: Tensor, lengths: Tensor) -> None:
        """Say how many own tokens of some rows are in the cache."""
        self.lengths[rows] = lengths
        self.count_all()

    def count_all(self) -> None:
        """What the host has to know of own tokens, however many have come to the cache."""
        self.used = int((self.starts + self.lengths).max())

    def count_step(self) -> None:
        """What the host has to know of a step."""
        self.used = min(self.used + 1, self.most_used)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `layout.Layout`; the row's T tokens are the R sequences' newest ones, in order."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.attend_rows(layer, query, key, value, options)[None]

    def attend_rows(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attention of the sequences' newest tokens: `query` (R, Hq, D), `key` and `value` (R, Hk, D) to (R, Hq, D)."""
        window = options.window_in(self.longest)
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        own_keys[self.rows, :, self.slots] = key
        own_values[self.rows, :, self.slots] = value
        num_rows, num_queries, _ = query.shape
        query = query.reshape(num_rows, key.shape[1], -1, query.shape[2])  # (R, Hk, G, D)
        own, own_sum = _partial(query, own_keys[:, :, : self.seen], own_values[:, :, : self.seen],
                                self.own_mask(window), options)  # fmt: skip
        if options.sinks is not None:
            weight, own_sum = with_sinks(own_sum, options.sinks.view(own_sum.shape[1:]))
            own = own * weight[..., None].to(own.dtype)
        if not self.shares:
            return own.reshape(num_rows, num_queries, -1)
        mask, is_past = (self.prompt_mask, None) if window is None else self._window_mask(window, query.shape[2])
        shared, shared_sum = _partial(self._to_blocks(query), self.prompt_keys[layer], self.prompt_values[layer], mask,
                                      options)  # fmt: skip
        shared_sum = self._from_blocks(shared_sum[..., None])
        if is_past is not None:
            shared_sum = shared_sum.masked_fill(is_past[:, None, None, None], -torch.inf)
        share = torch.sigmoid(shared_sum - own_sum[..., None])
        output = torch.lerp(own, self._from_blocks(shared), share.to(own.dtype))
        return output.reshape(num_rows, num_queries, -1)

    def _to_blocks(self, x: Tensor) -> Tensor:
        """(R, Hk, G, D) to (P, Hk, block_rows · G, D): all sequences of a prompt as one block of queries."""
        _, heads, repeat, size = x.shape
        shape = len(self.prompt_lengths) * self.block_rows, heads, repeat, size
        rows = x if self.blocks_are_full else x.new_zeros(shape).index_copy_(0, self.row_in_blocks, x)
        blocks = rows.view(-1, self.block_rows, heads, repeat, size).transpose(1, 2)
        return blocks.reshape(-1, heads, self.block_rows * repeat, size)

    def _from_blocks(self, x: Tensor) -> Tensor:
        """(P, Hk, block_rows · G, D) to (R, Hk, G, D)."""
        prompts, heads, queries, size = x.shape
        rows = x.view(prompts, heads, self.block_rows, queries // self.block_rows, size).transpose(1, 2).flatten(0, 1)
        return rows if self.blocks_are_full else rows[self.row_in_blocks]


def longer(table: Tensor, rows: int) -> Tensor:
    """The table with so many rows of zeros more."""
    return torch.cat([table, table.new_zeros((rows, *table.shape[1:]))])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (Hk, L, D) of different lengths as one (N, Hk, longest, D)."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([_with_slots(row, longest) for row in rows])


def _with_slots(x: Tensor, slots: int) -> Tensor:
    """(…, S, D) to (…, slots, D), the new slots filled with zeros."""
    return pad(x, (0, 0, 0, slots - x.shape[-2]))


def _stacked(old: Tensor | None, new: Tensor) -> Tensor:
    """(N, Hk, S, D) and (M, Hk, S', D) as one (N + M, Hk, max(S, S'), D)."""
    if old is None:
        return new
    slots = max(old.shape[2], new.shape[2])
    return torch.cat([_with_slots(old, slots), _with_slots(new, slots)])


def _mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) bool to an additive mask (N, 1, 1, K)."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]


def _partial(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys: the output (N, H, Q, Dv) and the log of its sum of exponentials (N, H, Q).

    `query` (N, H, Q, D), `keys` (N, H, K, D), `values` (N, H, K, Dv), `mask` (N, 1, 1, K) additive, with a key to be
    seen in each row.
    """
    if query.device.type == "cpu" and keys.shape[-1] == values.shape[-1] and options.softcap is None:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=mask, scale=options.scale
        )
    scores = cap_scores(_products(query, keys), options.scale_of(query), options.softcap) + mask
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp().to(values.dtype) @ values, sums


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """`query @ keysᵀ` in float32: rounded to bfloat16, scores would be off by more than the trainer's attention is."""
    if query.is_cuda and query.dtype != torch.float32:
        flat = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.view(*query.shape[:3], keys.shape[2])
    return (query @ keys.transpose(2, 3)).float()
