"""Mean reward and accuracy on the evaluation prompts, greedy and sampled, over all ranks."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint.state import TrainState
from ..rewards.scores import right_above
from ..rollout import Sampling
from .collect import Round, generate
from .gathering import gather_scores, gather_trajectories
from .parts import Parts


def evaluate(parts: Parts, state: TrainState, step: int) -> dict[str, float]:
    """Metrics of the rollout weights after `step` steps: how much of the update they hold and, where there are
    evaluation prompts, those under `eval/`. A collective.

    The noise is the same at every evaluation, so that two of them differ by the model alone.
    """
    with parts.phase("eval"):
        share = parts.engine.update_share()
        metrics = {} if share is None else {"rollout/update_share": share}
        if not parts.eval_prompts:
            return metrics
        metrics["eval/prompts"] = len(parts.eval_prompts)
        metrics |= _evaluated(parts, state, parts.sampling, "eval/", step)
        metrics |= _evaluated(parts, state, replace(parts.sampling, greedy=True), "eval/greedy_", step)
    sampled, greedy = (shown(metrics[f"eval/{kind}accuracy"], metrics[f"eval/{kind}reward"])
                       for kind in ("", "greedy_"))  # fmt: skip
    parts.display.say(f"step {step}: held-out accuracy {sampled} sampled, {greedy} greedy")
    return metrics


def shown(accuracy: float, reward: float) -> str:
    """An accuracy, with the mean reward unless that is the same number: of rewards other than 0 and 1 it is not."""
    texts = [f"{number:.3f}" for number in (accuracy, reward)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} (mean reward {texts[1]})"


def _evaluated(parts: Parts, state: TrainState, sampling: Sampling, prefix: str, step: int) -> dict[str, float]:
    """One completion a prompt. Accurate is a completion with more than half of the positive weights' sum as reward."""
    trajectories, scoring = generate(parts, state, Round(parts.eval_prompts, 1, sampling, "eval", step))
    with parts.ranks.shared_errors("scoring an evaluation"):
        scores = scoring.result(parts.watch.check)
    weights = parts.config.weights_after(step)
    batch = gather_trajectories(parts.ranks, parts.eval_prompts, trajectories, has_episodes=parts.episodes is not None)
    batch = gather_scores(parts.ranks, batch, scoring.rows, scores, weights, parts.config.scoring.error_budget)
    scored = batch.reward[~batch.reward.isnan()]
    return {
        f"{prefix}reward": float(scored.mean()),
        f"{prefix}accuracy": float((scored > right_above(weights)).double().mean()),
        f"{prefix}truncated": float((~batch.finished).double().mean()),
    }
