"""Whether a run replays the experts of its rollouts; see `model/routing.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.rollout import NO_ROUTES, RolloutConfig
from ..distributed.agreement import Gather, first_fault
from ..distributed.device import computes_on_gpu
from ..model.files import UnfitModel, require_replay
from ..model.routing import Routers, has_experts
from .probe import routing_fault

if TYPE_CHECKING:
    from torch import nn
    from transformers.configuration_utils import PreTrainedConfig

log = logging.getLogger(__name__)


def require_experts(rollout: RolloutConfig, model_config: PreTrainedConfig) -> None:
    """Raise ValueError where replay is asked for and a model with this config has no experts."""
    require_replay(rollout, has_experts(model_config), model_config.model_type)


def engine_obstacle(rollout: RolloutConfig) -> str | None:
    """Why the engine does not report the experts that tokens take; None where it does."""
    if rollout.engine in NO_ROUTES:
        return f"rollout.engine {rollout.engine} {NO_ROUTES[rollout.engine]}"
    if rollout.engine == "vllm" and rollout.routing_replay == "auto" and not computes_on_gpu():
        return "vLLM does not report the experts of a token on a CPU"
    return None


def needs_routes(rollout: RolloutConfig, model_config: PreTrainedConfig) -> bool:
    """Whether servers that draw for a model with this config have to report the experts that tokens take."""
    return bool(rollout.routing_replay) and has_experts(model_config) and engine_obstacle(rollout) is None


def settle_replay(
    models: Sequence[nn.Module], rollout: RolloutConfig, shared_prompts: bool, gather: Gather
) -> Routers | None:
    """Have all `models`, which share an architecture, replay routes as `rollout.routing_replay` asks: the routers of
    the first one, None where nothing is replayed. A line in the log says so.

    The last model has its weights. Raises UnfitModel where replay is asked for and cannot be had. A collective.
    """
    model = models[-1]
    if not has_experts(model.config):
        return None
    if not rollout.routing_replay:
        log.info("experts: rollout, reference and update each choose their own (rollout.routing_replay: false)")
        return None
    obstacle = engine_obstacle(rollout) or first_fault(gather, routing_fault(model, shared_prompts))
    if obstacle is not None and rollout.routing_replay is True:
        raise UnfitModel(f"rollout.routing_replay: True given, expected auto or false: {obstacle}")
    if obstacle is not None:
        log.warning("experts: rollout, reference and update each choose their own, which differ where scores are near "
                    "(no routing replay: %s)", obstacle)  # fmt: skip
        return None
    routers = [Routers(each) for each in dict.fromkeys(models)]
    log.info("experts: reference and update take those of the rollout, %d of %d in %d layers; no load-balance loss",
             routers[0].experts_of_a_token, routers[0].num_experts, len(routers[0].chosen))  # fmt: skip
    return routers[0]
