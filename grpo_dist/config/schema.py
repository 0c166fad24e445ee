"""Every option of a run: a dataclass for each group, a documented field for each option, and the checks of the fields.

Defaults are written here and nowhere else. All counts are global: `train.batch_size: 32` means 32 prompts a step on one
rank and on sixty-four. This module imports nothing heavy, so that the answer to a mistake in a config comes at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from .algorithm import AdvantageConfig, CriticConfig, LossConfig, check_algorithm, check_split_rows
from .checks import is_date, require, require_finite, require_seed, with_home
from .curriculum import CurriculumConfig, check_curriculum
from .environment import EnvironmentConfig
from .rewards import RewardConfig, ScoringConfig, require_rewards
from .rollout import RolloutConfig
from .vllm import check_vllm

ComputeDtype = Literal["float32", "bfloat16"]
PolicyDtype = Literal["auto", ComputeDtype]
Dtype = Literal[PolicyDtype, "float16"]
Quantization = Literal["nf4", "int8"]


@dataclass
class ModelConfig:
    """The policy's base model."""

    name: str = "toy"
    """Hub id or local path of a causal language model, or of a PEFT adapter, from which the run goes on (see
    lora.init_from); or `toy` or `toy-carry`, which ship with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: PolicyDtype = "auto"
    """Compute dtype of the policy; `auto` is bfloat16 on a GPU that has it (Ampere or newer), else float32. float16 is
    not allowed: small gradients would be 0 without a scaled loss."""
    quantization: Quantization | None = None
    """Quantise the linear layers of the base when it is loaded, to 4 bits a weight (`nf4`, with double quantisation) or
    8 (`int8`), and train adapters on it. Needs LoRA and the extra `quantized`. null: as in the checkpoint."""
    attn_implementation: str = "auto"
    """`auto` computes a prompt once for all completions of its group where the architecture allows it. Any other name
    goes to transformers (`sdpa`, `eager`, `flash_attention_2`), and each completion is then a row of its own."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time in the update."""
    tokenizer: str | None = None
    """Hub id or local path of the tokenizer; null takes the model's, or that of an adapter that has one."""


@dataclass
class LoraConfig:
    """Low-rank adapters; `lora: null` trains every weight instead."""

    r: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout in the adapters while training; rollouts never use it. The dropped units depend on token and layer, not
    on rank or pack."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get adapters: `all-linear`, or a list of names."""
    target_parameters: list[str] = field(default_factory=list)
    """Tensors with the weights of several experts that get adapters as well, by the ends of their names, such as
    `[experts.gate_up_proj, experts.down_proj]`: r for each expert (docs/experts.md)."""
    use_rslora: bool = False
    """Scale adapters by alpha / √r instead (rsLoRA)."""
    init_from: str | None = None
    """A PEFT adapter (LoRA or rsLoRA on linear layers) to go on from; a model.name that is an adapter means the same.
    r, alpha, use_rslora and target_modules are the adapter's. null starts with adapters that add nothing."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora.r", self.r, "a rank of at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share in [0, 1)")
        require(not self.target_parameters or self.dropout == 0, "lora.dropout", self.dropout,
                "0 with lora.target_parameters")  # fmt: skip


@dataclass
class ReferenceConfig:
    """The model as it was before training: reference of the KL term."""

    dtype: Dtype = "bfloat16"
    """Dtype of the reference's weights. With LoRA, the policy's dtype saves a copy of the base model, except under
    ZeRO-3 and FSDP2; on a CPU or an older GPU so does bfloat16 for a policy in float32 whose model was published
    in bfloat16."""
    placement: Literal["copy", "shared"] = "copy"
    """`copy` keeps a full frozen copy on every rank where the policy's base is not the same; `shared` uses the policy
    itself with its adapters off, where a copy does not fit (needs LoRA)."""
    model: Literal["adapter", "base"] = "adapter"
    """What the reference is of a run that goes on from an adapter: the base with that adapter, or the base alone."""


@dataclass
class DataConfig:
    """Where prompts come from and how they are read."""

    train_file: str | dict[str, float] = "configs/data/math_tasks_train.jsonl"
    """A JSONL, JSON, CSV or parquet file, a directory, or a hub id: what `datasets.load_dataset` takes; or
    `reasoning_gym:chain_sum?size=1000` for tasks of reasoning-gym. Several with weights are a mixture:
    `{a.jsonl: 2, b.jsonl: 1}`."""
    eval_file: str | None = None
    """The same for evaluation, held-out prompts of the same task; null for none."""
    subset: str | None = None
    """Configuration name of a hub data set, such as `main`."""
    train_split: str = "train"
    """Split of `train_file` where it is a data set with splits."""
    eval_split: str = "test"
    """Split of `eval_file` where it is a data set with splits."""
    prompt_column: str | None = "prompt"
    """Column with the prompt: text, or a list of messages with `role` and `content`; null where environments give the
    prompts."""
    answer_column: str | None = "answer"
    """Column with the gold answer, which rewards receive as `answer`; null where there is none."""
    system_prompt: str | None = None
    """A system message that goes before every prompt (needs a chat template)."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Render prompts with the tokenizer's chat template: `auto` does so for messages, and for text too where a system
    prompt is set."""
    template_date: str | None = None
    """The date (YYYY-MM-DD) for chat templates that write today's; null is the day on which the run begins. A resumed
    run keeps it."""
    max_prompt_length: int = 512
    """Longest prompt in tokens, template included."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (no prompt, too long, an answer no reward can read): `error` names the
    first of them and stops; `drop` leaves them out and says how many."""
    too_long: Literal["bad_row", "drop", "truncate"] = "bad_row"
    """What to do with prompts above max_prompt_length: treat them as bad rows, leave them out, or keep their last
    max_prompt_length tokens. The log says how many there are."""
    keep: dict[str, Any] | None = None
    """Use only rows with these values: for each column a value, a list of values, or `{min: …, max: …}`. The log says
    how many rows each column leaves out."""
    hold_out: bool = False
    """Leave training prompts out that `eval_file` has, too: a generator of small tasks makes the same ones again. The
    log says how many."""
    streaming: bool = False
    """Read rows when they are needed, for data that does not fit in memory; the order stays the same. Each row is
    checked when it is read, and a row that cannot be used stops the run."""
    curriculum: CurriculumConfig | None = None
    """Pass over prompts whose last group was too easy or too hard; null takes all prompts in turn."""

    def __post_init__(self) -> None:
        self.train_file, self.eval_file = with_home(self.train_file), with_home(self.eval_file)
        require(self.max_prompt_length >= 1, "data.max_prompt_length", self.max_prompt_length, "at least 1 token")
        require(self.template_date is None or is_date(self.template_date), "data.template_date", self.template_date,
                "a date as YYYY-MM-DD, or null")  # fmt: skip
        require(not (self.system_prompt and self.chat_template == "never"), "data.system_prompt", self.system_prompt,
                "null where data.chat_template is `never`")  # fmt: skip
        require(bool(self.train_file) and (isinstance(self.train_file, str) or min(self.train_file.values()) > 0),
                "data.train_file", self.train_file, "a file, or files with weights above 0")  # fmt: skip
        require(not self.streaming or (self.bad_rows, self.too_long, self.keep, self.hold_out) in [
            ("error", "bad_row", None, False), ("error", "truncate", None, False)], "data.streaming", self.streaming,
            "false where bad_rows, too_long, keep or hold_out leave rows out: a stream knows none")  # fmt: skip
        require(not self.hold_out or self.eval_file is not None, "data.hold_out", self.hold_out,
                "false where data.eval_file is null")  # fmt: skip


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
    has one, and a path names the checkpoint to continue from."""
    max_time: str | None = None
    """Time after which the run saves and ends, as HH:MM:SS; the same command resumes it. null for no limit."""
    allow_changes: bool = False
    """Resume although the base model, the adapters' shape, the data, the batch size or the seed has changed."""
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

    def __post_init__(self) -> None:
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

    def weights_at(self, step: int) -> list[float]:
        """The rewards' weights at a step (from 0)."""
        return [reward.weight_at(step) for reward in self.rewards]
