"""Every option of a run: a dataclass for each group, a documented field for each option, and the checks of the fields.

Groups of many options have files of their own. Defaults are written there and here and nowhere else. All counts are
global: `train.batch_size: 32` means 32 prompts a step on one rank and on sixty-four. No module of these options imports
anything heavy, so that the answer to a mistake in a config comes at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .algorithm import AdvantageConfig, CriticConfig, LossConfig, check_algorithm, check_split_rows
from .checks import require, require_finite, require_seed, with_home
from .data import DataConfig, check_curriculum
from .environment import EnvironmentConfig
from .model import LoraConfig, ModelConfig, ReferenceConfig
from .rewards import RewardConfig, ScoringConfig, require_rewards
from .rollout import RolloutConfig
from .vllm import check_vllm


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """`adamw`, fused on a GPU; `adamw_8bit`, bitsandbytes' (extra `quantized`), whose moments take a quarter of the
    memory; `muon` for matrices, with AdamW for embeddings, the head and everything that is no matrix. The last two
    need one process or DDP."""
    learning_rate: float = 1e-5
    """Peak learning rate. For adapters 1e-5 to 5e-5 suits a billion parameters, and 1e-4 to 2e-4 a hundred million. To
    train all weights takes less."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    scheduler: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """Course of the learning rate after warm-up, over train.num_train_steps. `warmup_stable_decay` (WSD) is constant,
    and goes down as a cosine in the last decay_ratio of the steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """The same as a share of train.num_train_steps."""
    decay_ratio: float = 0.1
    """Share of train.num_train_steps in which `warmup_stable_decay` goes down."""
    min_lr_ratio: float = 0.0
    """Share of the peak to which the learning rate goes down."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "a number above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more steps")
        require(self.warmup_steps == 0 or self.warmup_ratio == 0, "optim.warmup_ratio", self.warmup_ratio,
                "0 where optim.warmup_steps is given")  # fmt: skip
        for key in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            require(0 <= getattr(self, key) <= 1, f"optim.{key}", getattr(self, key), "a share in [0, 1]")
        require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "a number above 0")


@dataclass
class TrainConfig:
    """The loop."""

    batch_size: int = 32
    """Prompts a step, over all ranks."""
    num_train_steps: int = 100
    """Steps of the run; a step is one batch of rollouts and its updates."""
    updates_per_batch: int = 1
    """Passes over each batch of rollouts; more than one needs an objective with a ratio."""
    num_minibatches: int = 1
    """Optimizer steps a pass: the batch's prompts are divided into this many parts, each normalised by itself."""
    max_tokens_per_pack: int = 4096
    """Tokens computed at once in the update. Lower it to save memory."""
    sequence_parallel_size: int = 1
    """Ranks that compute a pack together, each some of its tokens and in attention some of the heads (Ulysses): for
    sequences that do not fit on one GPU. It divides the number of ranks and of the model's attention heads."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    num_eval_prompts: int = 256
    """Most prompts of data.eval_file in an evaluation."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    """Complete checkpoints to keep."""
    output_dir: str = "checkpoints"
    """Directory of all files that the run writes."""
    seed: int = 0
    """Seed of sampling, shuffling and adapter initialisation."""
    resume: str = "auto"
    """`auto` continues from the newest complete checkpoint of output_dir, `never` refuses to touch an output_dir that
    has one, and a path names the checkpoint to continue from. Where the same command has done so before, it continues
    from the newest one that it has written. A training whose checkpoints are gone is not overwritten."""
    max_time: str | None = None
    """Time after which the run saves and ends, as HH:MM:SS; the same command resumes it. null for no limit."""
    allow_changes: bool = False
    """Resume although the base model, the adapters' scale or dropout, the data or their order, the batch size or the
    seed has changed. What the checkpoint's weights and optimizer state do not fit is refused all the same."""
    max_bad_updates: int = 3
    """Updates in a row with an infinite or NaN gradient at which the run stops. Each such update is skipped."""
    max_failed_saves: int = 0
    """Checkpoints in a row that may fail to be written, as on a full disk, before the run stops. The last one of a run
    and the one after a signal must not fail."""
    hang_timeout_seconds: float = 300.0
    """The run ends where a process stands still for this long (it is stopped, or its node is lost), or where no rank
    passes a safe point for this long. The message names the rank, its phase and its stack. It must be longer than the
    longest single forward and backward pass."""

    @property
    def max_seconds(self) -> float | None:
        """train.max_time in seconds."""
        if self.max_time is None:
            return None
        hours, minutes, seconds = map(int, self.max_time.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def __post_init__(self) -> None:
        self.output_dir = with_home(self.output_dir)
        require(self.max_time is None or re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", self.max_time) is not None,
                "train.max_time", self.max_time, "HH:MM:SS, such as 03:45:00")  # fmt: skip
        require(self.hang_timeout_seconds >= 5, "train.hang_timeout_seconds", self.hang_timeout_seconds, "5 or more")
        for key, least in {
            "batch_size": 1, "num_train_steps": 1, "updates_per_batch": 1, "num_minibatches": 1,
            "max_tokens_per_pack": 2, "sequence_parallel_size": 1, "eval_every": 0, "num_eval_prompts": 1,
            "save_every": 0, "keep_checkpoints": 2, "max_bad_updates": 1, "max_failed_saves": 0,
        }.items():  # fmt: skip
            require(getattr(self, key) >= least, f"train.{key}", getattr(self, key), f"{least} or more")
        require_seed("train.seed", self.seed)


@dataclass
class LoggingConfig:
    """What a run records. It always writes metrics.jsonl."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers that get the metrics too, by Accelerate's names (`tensorboard`, `wandb`, …)."""
    log_completions: bool = True
    """Write every completion with its rewards and advantage to output_dir/completions."""
    show_completions_every: int = 10
    """Steps after which completions are shown: the best and the worst of a group on a terminal, and a table of some in
    the trackers; 0 shows none."""
    profile_step: int = 0
    """Step of which each rank writes operations, kernels and phases to output_dir/profile, for https://ui.perfetto.dev;
    0 for none."""

    def __post_init__(self) -> None:
        require(self.profile_step >= 0, "logging.profile_step", self.profile_step, "0 (none) or the number of a step")
        require(self.show_completions_every >= 0, "logging.show_completions_every", self.show_completions_every,
                "0 (never) or more steps")  # fmt: skip


@dataclass
class Config:
    """All options of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapters that are trained; null trains all of the model's weights."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    """Reward functions; the reward of a completion is their weighted sum."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    environment: EnvironmentConfig | None = None
    """Tools that the model may call, and the environment it plays in; null for one answer to each prompt."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        longest = self.max_sequence_length
        require(self.train.max_tokens_per_pack >= longest, "train.max_tokens_per_pack", self.train.max_tokens_per_pack,
                f"at least data.max_prompt_length + rollout.max_completion_length = {longest}")  # fmt: skip
        in_flight = self.rollout.max_tokens_in_flight
        require(in_flight == "auto" or in_flight >= longest, "rollout.max_tokens_in_flight", in_flight,
                f"room for one sequence of {longest} tokens")  # fmt: skip
        require(self.environment is None or self.data.chat_template != "never", "data.chat_template",
                self.data.chat_template, "auto or always with an environment: tools need a template")  # fmt: skip
        require(self.data.prompt_column is not None or bool(self.environment and self.environment.factory),
                "data.prompt_column", None, "a column, or environment.factory whose reset gives prompts")  # fmt: skip
        require_rewards(self.rewards, self.train.num_train_steps)
        require(self.lora is not None or self.reference.placement == "copy", "reference.placement",
                self.reference.placement, "`copy` where lora is null: without adapters to switch off, the policy "
                "cannot be its own reference")  # fmt: skip
        require(self.optim.warmup_steps <= self.train.num_train_steps, "optim.warmup_steps", self.optim.warmup_steps,
                f"at most train.num_train_steps = {self.train.num_train_steps}")  # fmt: skip
        require(self.train.num_minibatches <= self.train.batch_size, "train.num_minibatches",
                self.train.num_minibatches, f"at most train.batch_size = {self.train.batch_size}")  # fmt: skip
        check_algorithm(self)
        check_split_rows(self)
        check_vllm(self)
        check_curriculum(self)

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of a prompt and its completion."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def has_critic(self) -> bool:
        """Whether the policy has a head for values, against which advantages are measured."""
        return self.advantage.baseline == "critic"

    @property
    def own_code(self) -> list[str]:
        """The names of rewards, tools and environments; those of the user are `module:function`."""
        return [each.name for each in self.rewards] + (self.environment.own_code if self.environment else [])

    def weights_at(self, step: int) -> list[float]:
        """The rewards' weights at a step (from 0)."""
        return [reward.weight_at(step) for reward in self.rewards]

    def weights_after(self, steps: int) -> list[float]:
        """Those by which the model after some steps is evaluated: the ones of its last step, as `reward/mean` has."""
        return self.weights_at(max(0, steps - 1))
