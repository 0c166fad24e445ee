"""A training whose rollouts go as on a GPU, over pages, on a CPU: attention and draws are torch's in place of Triton's.

python tests/distributed/over_pages.py --config FILE ...
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from grpo_dist.model.layout import AttentionOptions
from grpo_dist.rollout import choose
from grpo_dist.rollout.native import gpu
from grpo_dist.rollout.native.pages import PAGE, PagePool
from grpo_dist.rollout.sampling import draw
from grpo_dist.train import main, train


def attend_rows(pool: PagePool, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
    """Each row over the keys and values in its tables, as `PagePool.attend_rows`, without windows, caps and sinks."""
    rows, heads = pool.num_rows, pool.keys[layer].shape[1]
    prompt = pool.prompt[:rows]
    tables = torch.cat([pool.prompt_table[prompt], pool.table[:rows]], 1).long()
    lengths = pool.prompt_lengths[prompt], pool.lengths[:rows] + 1
    widths = pool.prompt_table.shape[1] * PAGE, pool.table.shape[1] * PAGE
    seen = torch.cat([torch.arange(width) < each[:, None] for width, each in zip(widths, lengths, strict=True)], 1)
    keys, values = (store[layer][tables].transpose(1, 2).flatten(2, 3) for store in (pool.keys, pool.values))
    scores = query.unflatten(1, (heads, -1)) @ keys.transpose(2, 3) * options.scale_of(query)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values.nan_to_num()).flatten(1, 2)


if __name__ == "__main__":
    choose.own_step = lambda model, most="pages": ("pages", None)
    gpu.fused_draw = draw
    PagePool.attend_rows = attend_rows  # type: ignore[method-assign]
    sys.exit(main(train))
