"""What a run leaves: checkpoints on its way, and the model at its end."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict

from ..checkpoint import store
from ..checkpoint.final import remove_record, write_record
from ..checkpoint.guards import warn_of_slow_save
from ..checkpoint.reopening import check_final
from ..checkpoint.state import TrainState
from ..config.places import writing_to
from ..config.values import redacted
from ..distributed.device import dtype_name
from ..distributed.ranks import PhaseError
from ..model.dequantization import form_of
from ..model.export import save_final
from ..model.fixed_row import fixed_logits
from ..monitoring.json_lines import read_history
from ..monitoring.machine import versions
from ..report.card import write_card
from ..rewards.registry import file_digests
from .parts import Parts

log = logging.getLogger(__name__)


def save_checkpoint(parts: Parts, state: TrainState, *, may_fail: bool = False) -> None:
    """Commit a checkpoint of the state; a collective.

    Raises PhaseError where that fails and either may not (`may_fail`) or has failed more often in a row than
    train.max_failed_saves.
    """
    config, begun = parts.config.train, time.monotonic()
    parts.watch.phase = "save"
    tensors = parts.optimizer_state.collect() | state.tensors()
    meta = state.meta() | parts.engine.decoding | {
        "identity": parts.identity, "config": redacted(asdict(parts.config)), "versions": versions(),
        "files": file_digests(parts.config.own_code),
        "dtype": dtype_name(parts.policy.causal_lm.dtype),
    }  # fmt: skip
    try:
        with parts.ranks.shared_errors("saving a checkpoint"), parts.watch.patience():
            if parts.recorder is not None:
                with writing_to(parts.directory):
                    parts.recorder.flush()
                    store.save(parts.directory / "checkpoints", state.step, tensors, meta, config.keep_checkpoints)
    except PhaseError as error:
        parts.failed_saves.in_a_row += 1
        if not may_fail or parts.failed_saves.in_a_row > config.max_failed_saves:
            raise
        log.warning("going on without a checkpoint of step %d, the %d. in a row (train.max_failed_saves: %d): %s",
                    state.step, parts.failed_saves.in_a_row, config.max_failed_saves,
                    str(error).splitlines()[-1])  # fmt: skip
        return
    parts.failed_saves.in_a_row = 0
    warn_of_slow_save(time.monotonic() - begun)


def save_model(parts: Parts, state: TrainState) -> None:
    """Write the merged model, the tokenizer and the adapter to output_dir/final; a collective."""
    config, directory = parts.config, parts.directory / "final"
    parts.watch.phase = "export"
    with parts.watch.patience(), writing_to(parts.directory):
        with parts.rollout_model.open() as model:
            expected = fixed_logits(model) if parts.ranks.is_main else None
        if parts.ranks.is_main:
            remove_record(directory)
        save_final(parts.policy, parts.tokenizer, directory, parts.ranks.is_main)
        if expected is not None:
            history, options = read_history(parts.directory), redacted(asdict(config))
            form = form_of(parts.policy.causal_lm)
            write_card(directory, options, history, state.step, "merged", form)
            if config.lora:
                write_card(directory / "adapter", options, history, state.step, "adapter", form)
            write_record(directory, state.step, parts.directory / "checkpoints")
            check_final(directory, expected, parts.rollout_model.dtype, config.model.trust_remote_code)
        parts.ranks.barrier()
