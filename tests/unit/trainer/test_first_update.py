"""The first update of a run is compared with what drew its completions, and stops the run where they differ."""

from __future__ import annotations

from typing import Literal

import pytest

from grpo_dist.config.schema import Config, LoraConfig, LossConfig, ModelConfig, ReferenceConfig
from grpo_dist.distributed.device import DTYPES
from grpo_dist.model.files import UnfitModel
from grpo_dist.trainer.first_update import FirstUpdate, first_update

pytestmark = pytest.mark.quick

RIGHT = {"rollout/logprob_gap_max": 2e-6, "rollout/kl": 1e-12, "kl": 0.0}


def going_on(reference: Literal["adapter", "base"], dropout: float = 0.0) -> Config:
    """A config of a run that goes on from an adapter."""
    given = config(dropout=dropout)
    given.lora, given.reference.model = LoraConfig(dropout=dropout, init_from="adapter"), reference
    return given


def config(dtype: str = "float32", reference: str = "float32", dropout: float = 0.0, estimator: str = "k3") -> Config:
    """A config with a reference."""
    return Config(model=ModelConfig(dtype=dtype), reference=ReferenceConfig(dtype=reference),
                  lora=LoraConfig(dropout=dropout), loss=LossConfig(kl_coeff=0.1, kl_estimator=estimator))  # fmt: skip


def begin(given: Config, is_resumed: bool, updates_done: int) -> FirstUpdate:
    """The first update of a run whose reference computes in its own dtype."""
    return first_update(given, DTYPES[given.reference.dtype], is_resumed, updates_done)


@pytest.mark.parametrize(
    ("name", "value", "dtypes"),
    [
        ("rollout/logprob_gap_max", 0.4, ("float32", "float32")),  # later tokens seen
        ("rollout/logprob_gap_max", 0.002, ("float32", "bfloat16")),
        ("rollout/kl", 1e-4, ("float32", "float32")),
        ("rollout/kl", 0.2, ("bfloat16", "bfloat16")),
        ("kl", 0.05, ("float32", "float32")),  # dropout
        ("kl", 0.2, ("float32", "bfloat16")),
    ],
)
def test_a_difference_beyond_rounding_stops_the_run(name: str, value: float, dtypes: tuple[str, str]) -> None:
    with pytest.raises(UnfitModel, match=f"{name} is {value:.2g} nats before anything was learned.*Suspects"):
        begin(config(*dtypes), False, 0).check(RIGHT | {name: value})


@pytest.mark.parametrize(
    ("name", "dtypes", "most"),
    [
        ("rollout/logprob_gap_max", ("float32", "bfloat16"), 1e-3),
        ("rollout/kl", ("float32", "bfloat16"), 1e-6),
        ("rollout/kl", ("float16", "float32"), 0.02),
        ("rollout/kl", ("bfloat16", "float32"), 0.1),
        ("kl", ("float32", "float32"), 1e-6),
        ("kl", ("float32", "bfloat16"), 0.1),
        ("kl", ("bfloat16", "float32"), 0.1),
        ("kl", ("float16", "float16"), 0.02),
    ],
)
def test_so_much_is_rounding_and_no_more(name: str, dtypes: tuple[str, str], most: float) -> None:
    begin(config(*dtypes), False, 0).check(RIGHT | {name: most})
    other = "the reference" if name == "kl" else "the rollout"
    with pytest.raises(UnfitModel, match=f"not compute what {other} computes: {name} is .*, and {most:.0e} would be"):
        begin(config(*dtypes), False, 0).check(RIGHT | {name: 1.001 * most})


def test_what_is_not_known_is_let_through() -> None:
    """Gaps of single tokens in bfloat16; what was not measured, and numbers that are counted as a bad update."""
    begin(config("bfloat16", "bfloat16"), False, 0).check(RIGHT | {"rollout/logprob_gap_max": 0.7})
    begin(config(), False, 0).check({})
    begin(config(), False, 0).check({"kl": float("nan"), "rollout/kl": float("inf")})


def test_only_what_is_known_beforehand_is_checked() -> None:
    moved = {"rollout/logprob_gap_max": 0.4, "rollout/kl": 0.1, "kl": 3.0}
    begin(config(), True, 1).check(moved)  # resumed within a batch
    begin(config(dropout=0.1), True, 0).check(moved)
    begin(config(estimator="squared_sequence"), False, 0).check(RIGHT | {"kl": 3.0})
    begin(going_on("base"), False, 0).check(RIGHT | {"kl": 3.0})
    begin(going_on("adapter", dropout=0.1), False, 0).check(moved)
    lagging = config()
    lagging.rollout.lag = 1
    begin(lagging, True, 0).check(moved)  # drawn before the last update
    first_update(config(), None, False, 0).check(RIGHT | {"kl": 3.0})  # of no reference
    for one in (going_on("adapter"), config(dropout=0.1), lagging):
        with pytest.raises(UnfitModel, match="kl is 3"):
            begin(one, False, 0).check(RIGHT | {"kl": 3.0})
    with pytest.raises(UnfitModel, match="rollout/logprob_gap_max"):
        begin(config(), True, 0).check(moved)
    second = begin(config(), False, 0)
    second.check(RIGHT)
    second.check(moved)
