"""Parts: what a training is built from, by `build`, and what its functions take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint.guards import BadUpdates, FailedSaves
from ..config.schema import Config
from ..distributed.ranks import Ranks
from ..distributed.watch import Watch
from ..monitoring.console import Display
from ..monitoring.recorder import Recorder
from ..rewards.pool.pool import ScorerPool
from ..rollout.episodes import Episodes
from ..rollout.sampling import Sampling
from ..text.tokens import CompletionTexts
from ..types import Prompt
from .first_update import FirstUpdate
from .models import Models
from .phases import Phases

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts(Models):
    """What stays the same from the first step to the last, the models among it; what changes is TrainState."""

    config: Config
    directory: Path
    """train.output_dir."""
    lock: IO[str] | None
    """Holds the directory for this run; on the main rank."""
    identity: dict[str, Any]
    """What may not change when the run is resumed."""
    ranks: Ranks
    watch: Watch

    tokenizer: PreTrainedTokenizerBase
    texts_of: CompletionTexts
    prompts: Sequence[Prompt]
    eval_prompts: list[Prompt]
    sampling: Sampling
    """How completions of the training are drawn."""
    reward_names: list[str]
    scorer: ScorerPool
    episodes: Episodes | None
    """Plays with tools and environments; None where there are none."""

    phase: Phases
    display: Display
    recorder: Recorder | None
    """Writes metrics and completions; on the main rank."""
    first_update: FirstUpdate
    bad_updates: BadUpdates
    failed_saves: FailedSaves
