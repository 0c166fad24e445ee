"""The options in which algorithms differ (advantage, loss, critic), and which of them exclude each other.

Options are independent where possible; `check_algorithm` refuses combinations without a meaning. Presets of the
published algorithms are in configs/algorithms, and docs/algorithms.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .checks import require

if TYPE_CHECKING:
    from .rollout import RolloutConfig
    from .schema import Config

GroupBaseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]
Surrogate = Literal["grpo", "reinforce", "cispo", "sapo"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["sequence_mean", "token_mean", "constant", "prompt_mean", "sequence_sum"]
KlEstimator = Literal["k1", "k2", "k3", "abs", "squared_sequence"]
ImportanceCorrection = Literal["none", "truncate", "mask"]

AUTO_IS_RESOLVED = "Config replaces `auto` by what it stands for"


@dataclass
class AdvantageConfig:
    """How rewards become advantages."""

    baseline: Literal[GroupBaseline, "none", "critic"] = "mean"
    """Subtracted from each reward: the mean of its group, the mean of the others in its group, nothing, or the value
    of a learned critic."""
    scale: Literal["auto", Scale] = "auto"
    """Divide by the std of the group, by the std of the batch, or by nothing; `auto` is `group` with a group's baseline
    (but `batch` for `reinforce`) and `batch` without. Without a group's baseline `batch` also subtracts the mean."""
    several_rewards: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """Whether weighted rewards are summed before baseline and scale are applied, or after (GDPO)."""
    overlong_buffer: int = 0
    """Soft overlong punishment (DAPO): the reward falls by overlong_penalty over this many last tokens before
    rollout.max_completion_length; 0 turns it off."""
    overlong_penalty: float = 1.0
    """The most that the soft overlong punishment takes off."""
    drop_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the loss and its denominators. Without this, only their
    advantages are 0."""

    def __post_init__(self) -> None:
        require(self.overlong_buffer >= 0, "advantage.overlong_buffer", self.overlong_buffer, "0 (off) or more tokens")
        require(self.overlong_penalty > 0, "advantage.overlong_penalty", self.overlong_penalty, "a number above 0")


@dataclass
class LossConfig:
    """The objective of an update."""

    objective: Surrogate = "grpo"
    """`grpo`: clipped ratio (PPO, DeepSeekMath eq. 3). `reinforce`: log-probability times advantage. `cispo`: the same
    times the clipped and detached ratio. `sapo`: a soft gate on the ratio."""
    ratio_level: RatioLevel = "token"
    """Ratio of each token, or of its completion (GSPO: the geometric mean of its tokens' ratios)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; 1 turns that off."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative, such as 3; null for none."""
    sapo_temperature_positive: float = 1.0
    """How fast `sapo`'s gate closes where the advantage is positive."""
    sapo_temperature_negative: float = 1.05
    """How fast it closes where the advantage is not positive."""
    aggregation: Literal["auto", Aggregation] = "auto"
    """How tokens are weighted: the mean over sequences of the mean over tokens (GRPO), the mean over all tokens of the
    step (DAPO), the sum over tokens divided by sequences times rollout.max_completion_length (Dr. GRPO), the mean over
    prompts of the mean over their tokens, or the mean over sequences of the sum over tokens; `auto` is `sequence_sum`
    for `reinforce` and else `sequence_mean`."""
    mask_truncated: bool = False
    """Leave completions that the length limit cut out of the loss and its denominators. Their rewards still count in
    the baseline of their group."""
    gamma: float = 1.0
    """Discount of a reward for each token between it and the token whose advantage it enters."""
    kl_coeff: float = 0.04
    """Weight of the penalty that keeps the policy near the reference; 0 leaves the reference uncomputed."""
    kl_estimator: Literal["auto", KlEstimator] = "auto"
    """Schulman's estimators per token, the absolute log-ratio per token, or the squared log-ratio of a full sequence;
    `auto` is `squared_sequence` for `reinforce`, `k1` for kl_in `reward`, and else `k3`."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty goes: into the loss, which is differentiated, or off the rewards (of each token without a
    group's baseline, of the completion with one)."""
    kl_unbiased: bool = False
    """Multiply the penalty in the loss by the token's ratio: its gradient is then that of the KL itself."""
    kl_target: float | None = None
    """Adapt kl_coeff from step to step so that the metric `kl` (nats a token, by kl_estimator) approaches this; null
    keeps it fixed."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus, aggregated as the loss is."""
    top_entropy_quantile: float = 1.0
    """Share of the step's tokens that get a policy gradient: those of the highest entropy. 1 is all tokens."""
    importance_correction: Literal["auto", ImportanceCorrection] = "auto"
    """Weight tokens by the trainer's probability, before the batch's first update, over that with which they were
    drawn: cut off at importance_high (TIS), or 0 outside [importance_low, importance_high] (IcePop, MIS); `auto` is
    `truncate` where rollout.lag is 1 or rollout.engine `vllm`, and else `none`."""
    importance_level: RatioLevel = "token"
    """Whether that ratio is the token's or its completion's."""
    importance_low: float = 0.5
    """Lower bound of `mask`."""
    importance_high: float = 2.0
    """Upper bound of `truncate` and `mask`."""

    def __post_init__(self) -> None:
        require(0 <= self.clip_low <= 1, "loss.clip_low", self.clip_low, "a number in [0, 1]")
        require(self.clip_high >= 0, "loss.clip_high", self.clip_high, "0 or more")
        require(self.dual_clip is None or self.dual_clip > 1 + self.clip_high, "loss.dual_clip", self.dual_clip,
                f"null, or a ratio above 1 + loss.clip_high = {1 + self.clip_high:g}")  # fmt: skip
        for name in ("sapo_temperature_positive", "sapo_temperature_negative", "importance_high"):
            require(getattr(self, name) > 0, f"loss.{name}", getattr(self, name), "a number above 0")
        require(0 < self.gamma <= 1, "loss.gamma", self.gamma, "a discount in (0, 1]")
        require(self.kl_coeff >= 0, "loss.kl_coeff", self.kl_coeff, "0 or more")
        require(self.kl_target is None or self.kl_target > 0, "loss.kl_target", self.kl_target, "null, or nats above 0")
        require(self.entropy_coeff >= 0, "loss.entropy_coeff", self.entropy_coeff, "0 or more")
        require(0 < self.top_entropy_quantile <= 1, "loss.top_entropy_quantile", self.top_entropy_quantile,
                "a share in (0, 1]")  # fmt: skip
        require(0 <= self.importance_low < self.importance_high, "loss.importance_low", self.importance_low,
                f"a number in [0, loss.importance_high = {self.importance_high:g})")  # fmt: skip


@dataclass
class CriticConfig:
    """The learned baseline of advantage.baseline `critic`: a linear value head on the policy's hidden states."""

    learning_rate: float = 1e-3
    """Peak learning rate of the value head; it follows the policy's schedule."""
    loss_coeff: float = 0.1
    """Weight of the value loss beside the policy loss. Both change the weights below the head."""
    clip: float | None = 0.2
    """A value gains nothing by moving further than this from its old one in the updates of a batch; null: no limit."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation: 1 uses the rewards alone, 0 the critic's next value."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "critic.learning_rate", self.learning_rate, "a number above 0")
        require(self.loss_coeff > 0, "critic.loss_coeff", self.loss_coeff, "a number above 0")
        require(self.clip is None or self.clip > 0, "critic.clip", self.clip, "null, or a number above 0")
        require(0 <= self.gae_lambda <= 1, "critic.gae_lambda", self.gae_lambda, "a number in [0, 1]")


def resolve_auto(config: Config) -> None:
    """Replace each `auto` by what it stands for."""
    advantage, loss = config.advantage, config.loss
    is_reinforce = loss.objective == "reinforce"
    if advantage.scale == "auto":
        advantage.scale = "group" if has_groups(config) and not is_reinforce else "batch"
    if loss.aggregation == "auto":
        loss.aggregation = "sequence_sum" if is_reinforce else "sequence_mean"
    if loss.kl_estimator == "auto":
        loss.kl_estimator = "k1" if loss.kl_in == "reward" else "squared_sequence" if is_reinforce else "k3"
    if loss.importance_correction == "auto":
        loss.importance_correction = default_correction(config.rollout)


def default_correction(rollout: RolloutConfig) -> ImportanceCorrection:
    """What `loss.importance_correction: auto` stands for: a correction where another policy draws than the one that is
    trained, or another engine whose draw is its own."""
    return "truncate" if rollout.lag or rollout.engine == "vllm" else "none"


def has_groups(config: Config) -> bool:
    """Whether a completion's advantage is relative to its group."""
    return config.advantage.baseline in ("mean", "leave_one_out")


def serves_several_updates(config: Config) -> bool:
    """Whether a batch serves several updates. With one the old policy is the current one, and the ratio 1."""
    return config.train.updates_per_batch * config.train.num_minibatches > 1


def reference_in_loss(config: Config) -> bool:
    """Whether the loss has a KL term."""
    return config.loss.kl_coeff > 0 and config.loss.kl_in == "loss"


def has_reference(config: Config) -> bool:
    """Whether the algorithm needs the reference's log-probabilities."""
    return config.loss.kl_in == "reward" or reference_in_loss(config)


def check_algorithm(config: Config) -> None:
    """Resolve `auto`, and raise ValueError for options that have no meaning in combination."""
    advantage, loss = config.advantage, config.loss
    resolve_auto(config)
    in_groups = has_groups(config)
    group_size = config.rollout.group_size
    require(group_size >= (2 if in_groups else 1), "rollout.group_size", group_size,
            f"at least 2 for advantage.baseline `{advantage.baseline}`: it is relative to a group")  # fmt: skip
    require(in_groups or advantage.scale != "group", "advantage.scale", advantage.scale,
            f"`batch` or `none` where advantage.baseline is `{advantage.baseline}`")  # fmt: skip
    for key, given, off in (
        ("advantage.several_rewards", advantage.several_rewards, "sum_then_normalise"),
        ("advantage.drop_zero_variance", advantage.drop_zero_variance, False),
        ("rollout.max_resamples", config.rollout.max_resamples, 0),
    ):
        require(in_groups or given == off, key, given,
                f"{off} for advantage.baseline `{advantage.baseline}`: the option needs groups")  # fmt: skip
    require(advantage.overlong_buffer < config.rollout.max_completion_length, "advantage.overlong_buffer",
            advantage.overlong_buffer, "less than rollout.max_completion_length")  # fmt: skip
    _check_kl(advantage, loss)
    require(loss.objective != "reinforce" or not serves_several_updates(config), "loss.objective", loss.objective,
            "one with a ratio (grpo, cispo, sapo) where a batch serves several updates")  # fmt: skip
    require(loss.objective != "reinforce" or loss.ratio_level == "token", "loss.ratio_level", loss.ratio_level,
            "`token` where loss.objective is `reinforce`, which has no ratio")  # fmt: skip
    require(loss.objective == "grpo" or loss.dual_clip is None, "loss.dual_clip", loss.dual_clip,
            f"null where loss.objective is `{loss.objective}`")  # fmt: skip


def _check_kl(advantage: AdvantageConfig, loss: LossConfig) -> None:
    in_loss = loss.kl_in == "loss"
    require(loss.kl_coeff > 0 or (in_loss and not loss.kl_unbiased and loss.kl_target is None), "loss.kl_coeff",
            loss.kl_coeff, "a number above 0 where kl_in, kl_unbiased or kl_target is set")  # fmt: skip
    require(in_loss or advantage.several_rewards == "sum_then_normalise", "loss.kl_in", loss.kl_in,
            "`loss` with advantage.several_rewards `normalise_then_sum`, which would cancel its weight")  # fmt: skip
    require(not loss.kl_unbiased or (in_loss and loss.kl_estimator in ("k1", "k3")), "loss.kl_unbiased",
            loss.kl_unbiased, "false, except for `k1` and `k3` in the loss")  # fmt: skip
    require(loss.kl_coeff == 0 or not in_loss or loss.kl_estimator != "k1" or loss.kl_unbiased, "loss.kl_estimator",
            loss.kl_estimator, "another estimator, kl_unbiased, or kl_in `reward`: in the loss, the expected gradient "
            "of `k1` alone is 0")  # fmt: skip


def check_split_rows(config: Config) -> None:
    """Raise ValueError where a group of ranks cannot divide the rows: some options need a whole completion at once."""
    if config.train.sequence_parallel_size == 1:
        return
    for key, given, refused in (
        ("loss.ratio_level", config.loss.ratio_level, "sequence"),
        ("loss.importance_level", config.loss.importance_level, "sequence"),
        ("loss.kl_estimator", config.loss.kl_estimator, "squared_sequence"),
    ):
        require(given != refused, key, given, "another where train.sequence_parallel_size is above 1: ranks have parts "
                "of a completion")  # fmt: skip
    require(config.model.attn_implementation == "auto", "model.attn_implementation", config.model.attn_implementation,
            "auto where train.sequence_parallel_size is above 1")  # fmt: skip
