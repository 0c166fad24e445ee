"""Parts: what a training is built from, by `build`, and what its functions take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..checkpoint.guards import BadUpdates
from ..config.schema import Config
from ..distributed.optimizer_state import OptimizerState
from ..distributed.ranks import Ranks
from ..distributed.watch import Watch
from ..model.policy import Policy
from ..model.reference import Reference
from ..model.rollout_weights import RolloutModel
from ..monitoring.console import Display
from ..monitoring.recorder import Recorder
from ..rewards.pool.pool import ScorerPool
from ..rollout import Engine
from ..text.tokens import CompletionTexts
from ..types import Prompt
from .first_update import FirstUpdate
from .phases import Phases
from .saving import Saves


@dataclass(frozen=True)
class Parts:
    """What stays the same from the first step to the last; what changes is TrainState."""

    config: Config
    directory: Path
    """train.output_dir."""
    lock: IO[str] | None
    """Holds the directory for this run; on the main rank."""
    identity: dict[str, Any]
    """What may not change when the run is resumed."""
    ranks: Ranks
    watch: Watch

    tokenizer: Any
    texts_of: CompletionTexts
    prompts: Sequence[Prompt]
    eval_prompts: list[Prompt]
    reward_names: list[str]
    scorer: ScorerPool

    policy: Policy
    wrapped: Any
    """The policy as DDP or DeepSpeed wraps it: the one to call."""
    optimizer: Any
    optimizer_state: OptimizerState
    reference: Reference | None
    """None where nothing depends on it."""
    rollout_model: RolloutModel
    engine: Engine
    share_prompts: bool
    """Whether a pack computes a prompt once for several completions."""

    phase: Phases
    display: Display
    recorder: Recorder | None
    """Writes metrics and completions; on the main rank."""
    first_update: FirstUpdate
    bad_updates: BadUpdates
    saves: Saves
