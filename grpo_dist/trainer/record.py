"""A step written down: metrics, completions, and an evaluation where one is due."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from ..algorithm.targets import penalty_metrics
from ..checkpoint.state import TrainState
from ..config.places import writing_to
from ..model import toy
from ..monitoring.json_lines import read_history
from ..monitoring.metrics import batch_metrics
from ..monitoring.traces import trace_lines
from ..rewards.text import CONVERSATION
from ..types import Batch, Metrics
from .evaluation import evaluate
from .parts import Parts
from .update_metrics import update_metrics


def record(parts: Parts, state: TrainState, batch: Batch, seconds: float) -> Metrics:
    """Write down the step that is about to be done, after `seconds`, and return its metrics; a collective."""
    config, done = parts.config, state.step + 1
    metrics: dict[str, float | None] = {"step": done, "epoch": state.sampler.epoch_after(state.step)}
    metrics |= batch_metrics(batch, parts.reward_names) | update_metrics(state.metrics)
    metrics |= penalty_metrics(config, batch) | parts.engine.metrics() | {"time/step": seconds}
    if config.loss.kl_target is not None:
        metrics["kl_coeff"] = state.kl_coeff
    if is_due(config.train.eval_every, done, config.train.num_train_steps):
        metrics |= evaluate(parts, state, done)
    metrics |= parts.phase.metrics()  # after the evaluation, which is of this step
    written = write(parts, metrics, batch)
    parts.display.step(written)
    return written


def is_due(every: int, done: int, last: int) -> bool:
    """Whether something that comes every so many steps (0: never before the end) comes after `done` of `last`."""
    return done == last or (every > 0 and done % every == 0)


def write(parts: Parts, metrics: Metrics, batch: Batch | None = None) -> Metrics:
    """Write down metrics and, where they are logged, completions, on the main rank; returns the metrics as they are
    written, None in place of numbers that are not finite."""
    metrics = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in metrics.items()}  # fmt: skip
    if parts.recorder is None:
        return metrics
    step = int(metrics["step"] or 0)
    due = parts.config.logging.log_completions or parts.display.shows_completions(step)
    with writing_to(parts.directory):
        if due and batch is not None:
            plain = [batch.prompts[group].messages is None for group in batch.group.tolist()]
            texts = [text for n, goes_on in enumerate(plain)
                     for text in parts.texts_of([batch.completion_ids(n)], goes_on=goes_on)]  # fmt: skip
            traces = trace_lines(batch, parts.texts_of.pieces, batch.extras.get(CONVERSATION))
            parts.recorder.completions(step, batch, texts, traces, parts.reward_names)
            parts.display.completions(step, batch, texts)
        new = parts.recorder.metrics(metrics)
    parts.display.alarms(new, parts.recorder.alarms.ringing)
    return metrics


def summary(parts: Parts) -> str:
    """What the run achieved and where it lies."""
    lines, directory = [], parts.directory
    evaluations = [entry for entry in read_history(directory) if entry.get("eval/accuracy") is not None]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        lines.append(f"held-out accuracy, sampled: {first['eval/accuracy']:.3f} before (step {first['step']}), "
                     f"{last['eval/accuracy']:.3f} after (step {last['step']})")  # fmt: skip
    lines += [f"trained model:  {directory / 'final'}", f"metrics:        {directory / 'metrics.jsonl'}"]
    if (directory / "report.html").exists():
        lines.append(f"report:         {directory / 'report.html'}")
    if "tensorboard" in parts.config.logging.trackers:
        lines.append(f"curves:         tensorboard --logdir {_quoted(directory / 'tensorboard')}")
    lines += [f"talk to it:     python -m grpo_dist chat {_quoted(directory)}",
              f"take it home:   python -m grpo_dist export {_quoted(directory)}"]  # fmt: skip
    if parts.config.data.eval_file is not None:
        lines.append(f"measure it:     python -m grpo_dist evaluate --model {_quoted(directory / 'final')} --config "
                     f"{_quoted(directory / 'config.yaml')}")  # fmt: skip
    if parts.config.model.name in toy.MODELS:
        lines.append("next:           python -m grpo_dist init own.yaml (a config for a task of your own)")
    return "\n".join(lines)


def _quoted(path: Path) -> str:
    """A path as a shell reads it back."""
    return shlex.quote(str(path))
