"""A pack that ranks divide among them: every token is on one of them, beside all that belongs to it."""

from __future__ import annotations

import pytest
import torch
from random_batches import make_batch

from grpo_dist.config.schema import Config, ModelConfig, TrainConfig
from grpo_dist.distributed.row_group import RowGroup
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.packing import FILLER, Piece, make_pack
from grpo_dist.model.split_rows import SplitLayout, require_whole_groups, split_pack

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("size", [2, 3, 5, 16])
@pytest.mark.parametrize("pieces", [[Piece(0, [0, 1]), Piece(1, [2])], [Piece(1, [2])], []])
def test_each_token_is_on_one_rank(pieces: list[Piece], size: int) -> None:
    pack = make_pack(make_batch([(5, [3, 4]), (2, [1])], share_sampled=0.7), pieces)
    shares = [split_pack(pack, RowGroup(size, 0, place, None)) for place in range(size)]
    assert min(len(share.ids) for share in shares) > 0
    # the first token of a completion is predicted by the end of its prompt, which may be on a rank before
    order = torch.cat([share.token for share in shares]).argsort()
    for name in ("targets", "token", "sequence"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares])[order], getattr(pack, name))
    filled = max(0, size - len(pack.ids))
    for name, filler in (("ids", 0), ("positions", 0), ("owner", FILLER)):
        expected = torch.cat([getattr(pack, name), torch.full((filled,), filler)])
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), expected)
    starts = [sum(len(share.ids) for share in shares[:place]) for place in range(size)]
    placed = [share.predictor + start for share, start in zip(shares, starts, strict=True)]
    assert torch.equal(torch.cat(placed)[order], pack.predictor)
    assert sum(share.useful for share in shares) == pack.useful
    for share in shares:
        assert isinstance(share.layout, SplitLayout) and share.layout.lengths == [len(each.ids) for each in shares]
        assert sum(prompt + sum(rest) for prompt, rest in share.layout.pieces) == sum(share.layout.lengths)


def test_groups_that_do_not_fit_are_refused() -> None:
    config = Config(model=ModelConfig(), train=TrainConfig(sequence_parallel_size=4))
    model_config = load_model_config(config.model)
    require_whole_groups(config, model_config, 8, None)
    for num_ranks, size, obstacle, message in (
        (6, 4, None, "train.sequence_parallel_size: 4 given, expected a divisor of the number of ranks, 6"),
        (6, 3, None, "train.sequence_parallel_size: 3 given, expected a divisor of the 4 attention heads of toy"),
        (4, 4, "no attention layers", "expected 1 for toy, whose tokens cannot be divided among ranks: no attention"),
    ):
        config = Config(model=ModelConfig(), train=TrainConfig(sequence_parallel_size=size))
        with pytest.raises(ValueError, match=message):
            require_whole_groups(config, model_config, num_ranks, obstacle)
