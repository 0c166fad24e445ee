"""The options of the models: the policy's base, its adapters, and the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .checks import require

ComputeDtype = Literal["float32", "bfloat16"]
PolicyDtype = Literal["auto", ComputeDtype]
Dtype = Literal[PolicyDtype, "float16"]
Quantization = Literal["nf4", "int8"]


@dataclass
class ModelConfig:
    """The policy's base model."""

    name: str = "toy"
    """Hub id or local path of a causal language model, or of a PEFT adapter, from which the run goes on (see
    lora.init_from); or `toy`, `toy-carry` or `toy-tools`, which ship with the package."""
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
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: false}`. The template of the trained model has these
    values too, for whoever gives no others."""


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
