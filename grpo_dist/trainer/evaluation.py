"""Mean reward and accuracy on the evaluation prompts, greedy and sampled, over all ranks."""

from __future__ import annotations

from dataclasses import replace

from ..monitoring.metrics import is_right
from ..rollout import Sampling
from ..rollout.choose import made_of
from ..rollout.fidelity import update_share
from ..rollout.native.kernel import MERGED
from .build import Run
from .gathering import gather_completions, gather_scores


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Metrics of the rollout weights as they are: how much of the update they hold and, where there are evaluation
    prompts, those under `eval/`. A collective.

    The noise is the same at every evaluation, so that two of them differ by the model alone.
    """
    with run.phase("eval"):
        with run.rollout_model.open() as model:
            merged = made_of(run.engine)["decoding"] == "compiled" and model.dtype in MERGED
            share = update_share(model, merged=merged)
        metrics = {} if share is None else {"rollout/update_share": share}
        if not run.eval_prompts:
            return metrics
        metrics |= _measure(run, run.sampling, "eval/", step)
        metrics |= _measure(run, replace(run.sampling, greedy=True), "eval/greedy_", step)
    run.display.say(f"step {step}: held-out accuracy {metrics['eval/accuracy']:.3f} sampled, "
                    f"{metrics['eval/greedy_accuracy']:.3f} greedy")  # fmt: skip
    return metrics


def _measure(run: Run, sampling: Sampling, prefix: str, step: int) -> dict[str, float]:
    """One completion a prompt. Accurate is a completion with more than half of the positive weights' sum as reward."""
    completions, scoring = run.generate(run.eval_prompts, 1, sampling, "eval", step)
    with run.ranks.together("scoring an evaluation"):
        scores = scoring.result(run.watch.check)
    weights = [reward.weight_at(step) for reward in run.config.rewards]
    batch = gather_completions(run.ranks, run.eval_prompts, completions)
    batch = gather_scores(run.ranks, batch, scoring.rows, scores, weights, run.config.scoring.error_budget)
    scored = batch.reward[~batch.reward.isnan()]
    right = is_right(scored, weights)
    return {
        f"{prefix}reward": float(scored.mean()),
        f"{prefix}accuracy": float(right.double().mean()),
        f"{prefix}truncated": float((~batch.finished).double().mean()),
    }
