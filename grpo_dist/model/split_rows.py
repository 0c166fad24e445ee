"""A pack that a group of ranks divides among them: each computes some consecutive tokens of its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.schema import Config
from ..distributed.row_group import RowGroup, to_heads, to_tokens
from ..types import no_routes
from .attention import PackLayout, RowLayout
from .files import require_divisors
from .layout import AttentionOptions, Pieces
from .packing import FILLER, Pack
from .shared_prefix import Segments

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


@dataclass(frozen=True)
class SplitLayout:
    """The layout of a row of which this rank has some tokens."""

    row: PackLayout
    """Of the whole row."""
    group: RowGroup
    lengths: list[int]
    """Tokens of each rank of the group."""

    @property
    def pieces(self) -> Pieces:
        """See `attention.PackLayout`."""
        return self.row.pieces

    def to(self, device: torch.device, segments: Segments | None = None) -> SplitLayout:
        """See `attention.PackLayout`."""
        return replace(self, row=self.row.to(device, segments))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `layout.Layout`; T is the number of own tokens."""
        size, heads = self.group.size, query.shape[1]
        if key.shape[1] % size:  # ranks need keys of their own query heads alone
            key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
        # one message has a rank's heads of queries, keys and values side by side: (size, t, width)
        parts = [x[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2) for x in (query, key, value)]
        whole = to_heads(torch.cat(parts, -1), self.group, self.lengths).split([x.shape[-1] for x in parts], -1)
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        query, key, value = (x.unflatten(-1, (-1, head)).transpose(1, 2) for x, head in zip(whole, sizes, strict=True))
        if options.sinks is not None:
            options = replace(options, sinks=options.sinks.chunk(size)[self.group.place])
        attended = self.row.attend(layer, query, key, value, options)
        own = to_tokens(attended.flatten(2), self.group, self.lengths)
        return own.transpose(0, 1).reshape(1, -1, heads, attended.shape[-1])


def require_whole_groups(config: Config, model_config: PreTrainedConfig, num_ranks: int, obstacle: str | None) -> None:
    """Raise ValueError where train.sequence_parallel_size fits neither the ranks nor the model; `obstacle` is why the
    model's prompts cannot be shared, or None."""
    heads = getattr(model_config.get_text_config(), "num_attention_heads", None)
    require_divisors(config, num_ranks, heads, obstacle)


def split_pack(pack: Pack, group: RowGroup) -> Pack:
    """This rank's tokens of a pack with a layout. A row of fewer tokens than ranks is filled up."""
    assert pack.layout is not None, "a run without packs has groups of one rank"
    missing = max(0, group.size - len(pack.ids))
    layout = RowLayout([*pack.layout.pieces, (missing, [])]) if missing else pack.layout
    own, lengths = group.share(len(pack.ids) + missing), group.lengths(len(pack.ids) + missing)
    ids, positions = (torch.cat([x, x.new_zeros(missing)])[own] for x in (pack.ids, pack.positions))
    owner = torch.cat([pack.owner, pack.owner.new_full((missing,), FILLER)])[own]
    routes = pack.routes
    if routes is not None:
        routes = torch.cat([routes, no_routes(missing, like=routes)])[own]
    here = (pack.predictor >= own.start) & (pack.predictor < own.stop)
    return Pack(
        ids, positions, pack.predictor[here] - own.start, pack.targets[here], pack.token[here], pack.sequence[here],
        owner, SplitLayout(layout, group, lengths), useful=int((owner != FILLER).sum()) if pack.useful else 0,
        routes=routes,
    )  # fmt: skip
