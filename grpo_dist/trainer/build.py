"""From a config to the parts of a training and the state it begins with."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ..checkpoint import store as checkpoint
from ..checkpoint.guards import BadUpdates, FailedSaves, lock
from ..checkpoint.resume import (
    changes,
    changes_of_batches,
    identity,
    require_same_start,
    resume_path,
    resumed_kl_coeff,
    with_template_date,
)
from ..checkpoint.state import TrainState
from ..config.files import as_yaml
from ..config.parse import is_first_rank
from ..config.places import require_writable, writing_to
from ..config.schema import Config
from ..config.values import redacted
from ..data.mixture import load_training
from ..data.order import Curriculum, Mixture, Sampler
from ..distributed.agreement import first_fault
from ..distributed.device import dtype_name, resolve_dtype, set_up_cuda
from ..distributed.launch import LaunchError, place_in_launch
from ..distributed.launch_config import require_known_launch, require_optimizer
from ..distributed.optimizer_state import OptimizerState, WholeOptimizerState
from ..distributed.ranks import PhaseError, Ranks
from ..distributed.rendezvous import Rendezvous
from ..distributed.watch import Interrupted, Watch, serve_store
from ..environments.host import EnvironmentHost
from ..model.adapter import with_adapter
from ..model.config_files import end_token_ids, ignored_generation_options, load_model_config, load_tokenizer
from ..model.files import UnfitModel
from ..model.headers import compare_headers
from ..monitoring.console import Display
from ..monitoring.json_lines import read_history, read_json_lines
from ..monitoring.machine import FILE as RECORD_OF_STARTS
from ..monitoring.machine import devices_of, record_start, versions
from ..monitoring.recorder import Recorder
from ..monitoring.trackers import require_known
from ..preflight.contents import try_model
from ..preflight.doubts import doubts
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import EPISODE_COLUMNS, labels
from ..rollout.choose import UnfitEngine
from ..rollout.episodes import Episodes
from ..rollout.playing import episodes_of, open_host, prompt_reader, templated
from ..rollout.sampling import Sampling, sampling_with
from ..text.files import write_file
from ..text.tokens import CompletionTexts
from ..types import Prompt
from .first_update import first_update
from .models import Models, load_models
from .parts import Parts
from .phases import Phases

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what to do."""


@dataclass(frozen=True)
class _Data:
    """What is known before ranks meet: the config as it is from here on, tokenizer, prompts."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    prompts: Sequence[Prompt]
    sampler: Sampler | Mixture | Curriculum
    eval_prompts: list[Prompt]
    end_ids: list[int]
    sampling: Sampling
    identity: dict[str, Any]


@dataclass(frozen=True)
class _Start:
    """What a rank has made by itself before ranks meet."""

    data: _Data
    resume_from: Path | None
    host: EnvironmentHost | None
    scorer: ScorerPool
    episodes: Episodes | None
    lock: IO[str] | None


def build(config: Config) -> tuple[Parts, TrainState]:
    """Everything a training needs, and where it stands: at its start, or where its newest checkpoint was; a collective.

    Raises UserError for what the user has got wrong, LaunchError for what the launch has.
    """
    set_up_cuda()
    place_in_launch()  # raises where the launch is none
    directory = Path(config.train.output_dir)
    is_main = is_first_rank()
    _log_on_main(is_main, others=logging.ERROR)  # as long as all ranks come to the same
    try:
        start = _prepare(config, directory, is_main)
    except (ValueError, OSError, checkpoint.DamagedCheckpoint) as error:
        Rendezvous.fail_before(error)
        raise UserError(str(error)) from error
    resume_from = start.resume_from
    ranks = Ranks(resolve_dtype(config.model.dtype), config.optim, config.train.sequence_parallel_size)
    _log_on_main(is_main, others=logging.WARNING)
    data = _agree_on_data(ranks, start)
    config = data.config
    models = _load_models(data, ranks, resume_from)
    state = TrainState(0, config.loss.kl_coeff, data.sampler)
    if resume_from is not None:
        _resume(state, data, resume_from, ranks, models.optimizer_state)
    try:
        models.engine.update_weights()
        recorder = _open_records(config, directory, ranks, state, models.policy.causal_lm.dtype)
    except (Interrupted, PhaseError) as error:  # raised on all ranks alike
        models.engine.close()
        raise UserError(str(error)) from error
    hang_seconds = config.train.hang_timeout_seconds
    watch = Watch(ranks.rank, ranks.num_ranks, serve_store(ranks.rank, ranks.num_ranks, hang_seconds),
                  config.train.max_seconds, hang_seconds, lambda: ranks.collectives_entered)  # fmt: skip
    display = Display(config.train.num_train_steps, state.step, ranks.is_main, config.logging.show_completions_every)
    parts = Parts(
        config=config, directory=directory, lock=start.lock, identity=data.identity, ranks=ranks, watch=watch,
        tokenizer=data.tokenizer, texts_of=CompletionTexts(data.tokenizer, data.end_ids), prompts=data.prompts,
        eval_prompts=data.eval_prompts, sampling=data.sampling, reward_names=labels(config.rewards),
        scorer=start.scorer, episodes=start.episodes,
        **vars(models),
        phase=Phases(display, watch, ranks.device), display=display,
        recorder=recorder,
        first_update=first_update(
            config, models.reference.policy.causal_lm.dtype if models.reference else None, resume_from is not None,
            state.updates),
        bad_updates=BadUpdates(directory, config.train.max_bad_updates, ranks.is_main), failed_saves=FailedSaves(),
    )  # fmt: skip
    ranks.end_start()
    return parts, state


def close(parts: Parts, all_ranks: bool) -> None:
    """End the workers, close the files and, unless other ranks may be stuck, leave the process group."""
    parts.watch.close()
    if all_ranks:  # rank 0 serves what the others watch: it stays until nobody does
        parts.ranks.barrier()
    parts.display.close()
    parts.scorer.close()
    parts.engine.close()
    if parts.episodes:
        parts.episodes.host.close()
    if parts.recorder:
        parts.recorder.close()
    if all_ranks:
        parts.ranks.end()


def _prepare(config: Config, directory: Path, is_main: bool) -> _Start:
    """All that a user can have got wrong, before ranks meet and models are loaded.

    Raises ValueError, OSError or DamagedCheckpoint.
    """
    require_known_launch(os.environ)
    require_optimizer(config.optim, os.environ)
    config = with_adapter(config)
    resume_from = resume_path(config)
    host = open_host(config)
    data = _load_data(templated(config), resume_from, host)
    for change in changes(resume_from, data.config, data.identity) if resume_from else ():
        log.warning("%s", change)
    require_known(config.logging.trackers)
    scorer = ScorerPool(config.rewards, config.scoring)
    for prompt in (data.prompts[0], *data.eval_prompts[:1]):
        scorer.check_columns([*prompt.columns, *(EPISODE_COLUMNS if host else ())])
    episodes = episodes_of(data.config, host, data.tokenizer, data.end_ids)
    require_writable(directory)
    read_history(directory)  # raises, as the next line, for what the records of this run could not be added to
    read_json_lines(directory / RECORD_OF_STARTS)
    directory.mkdir(parents=True, exist_ok=True)
    return _Start(data, resume_from, host, scorer, episodes, lock(directory) if is_main else None)


def _load_models(data: _Data, ranks: Ranks, resume_from: Path | None) -> Models:
    """The models; a collective. Raises UserError, or LaunchError where other ranks do not know of the error."""
    places = ranks.gather_objects(resume_from and resume_from.name)
    if len(set(places)) > 1:
        directory = data.config.train.output_dir
        raise UserError(f"train.output_dir: ranks see different checkpoints in {directory}, {places} in order "
                        "of rank; it must lie on a file system that all nodes share")  # fmt: skip
    try:
        return load_models(data.config, data.model_config, data.end_ids, ranks, resume_from)
    except LaunchError:
        raise
    except Exception as error:
        all_know = ranks.fail(error)
        if not isinstance(error, (UnfitModel, UnfitEngine)):
            raise
        raise (UserError(str(error)) if all_know else LaunchError(f"rank {ranks.rank}: {error}")) from error


def _load_data(config: Config, resume_from: Path | None, host: EnvironmentHost | None) -> _Data:
    tokenizer = load_tokenizer(config.model)
    config = with_template_date(config, tokenizer, resume_from)
    model_config = load_model_config(config.model)
    if left_out := try_model(config, tokenizer, model_config, int(os.environ.get("WORLD_SIZE", "1"))):
        log.info("adapters: none on %s", left_out)
    compare_headers(config.model, model_config)  # of what is left out, transformers warns when it loads the rest
    reader = prompt_reader(config, tokenizer, host)
    prompts, sampler = load_training(reader, config.train)
    eval_prompts: list[Prompt] = []
    if config.data.eval_file:
        loaded, _ = reader.load(config.data.eval_file, config.data.eval_split)
        eval_prompts = loaded[: config.train.num_eval_prompts]
    end_ids = end_token_ids(config.model, tokenizer)
    for doubt in doubts(config, tokenizer, prompts, end_ids):
        log.warning("%s", doubt)
    sampling = sampling_with(config.rollout, tokenizer, end_ids, model_config)
    if ignored := ignored_generation_options(config.model, config.rollout):
        log.info("%s", ignored)
    return _Data(config, tokenizer, model_config, prompts, sampler, eval_prompts, end_ids, sampling,
                 identity(config, model_config, prompts, eval_prompts))  # fmt: skip


def _agree_on_data(ranks: Ranks, own: _Start) -> _Data:
    """The data with rank 0's template_date, where a run is started about midnight; a collective.

    Raises UserError where ranks were started otherwise all the same.
    """
    data = own.data
    date = ranks.gather_objects(data.config.data.template_date)[0]
    if date != data.config.data.template_date:
        dated = replace(data.config, data=replace(data.config.data, template_date=date))
        data = _load_data(dated, own.resume_from, own.host)
    dtypes = {
        option: dtype_name(resolve_dtype(given.dtype))
        for option, given in (("model.dtype", data.config.model), ("reference.dtype", data.config.reference))
    }
    start = {"config": redacted(asdict(data.config)), "versions": versions(), "identity": data.identity,
             "dtypes": dtypes}  # fmt: skip
    try:
        require_same_start(ranks.gather_objects(start))
    except ValueError as error:
        raise UserError(str(error)) from error
    return data


def _resume(
    state: TrainState, data: _Data, path: Path, ranks: Ranks, optimizer_state: OptimizerState | WholeOptimizerState
) -> None:
    """Take up the checkpoint at `path`; a collective. Raises UserError on all ranks where it does not fit the run."""
    problem = None
    try:
        tensors, meta = checkpoint.load(path)
        optimizer_state.restore(tensors)
        state.restore(tensors, meta, data.prompts)
        changed = changes_of_batches(meta, data.config, data.identity)
        state.kl_coeff = resumed_kl_coeff(meta, data.config.loss)
    except (checkpoint.DamagedCheckpoint, TypeError, ValueError, LookupError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"  # although its checksums are right
    if problem := first_fault(ranks.gather_objects, problem):
        reason = checkpoint.CHANGED
        if data.config.train.allow_changes:
            reason = "train.allow_changes does not help where its weights are others; choose another train.output_dir"
        raise UserError(f"{path} does not fit this run ({problem}): {reason}")
    log.info("resumed from %s", path)
    if changed and (state.batch or state.ahead):
        if ranks.is_main:
            log.warning("step %d begins anew, without the completions that the checkpoint has: they do not fit what "
                        "has changed (%s)", state.step + 1, "; ".join(changed))  # fmt: skip
        state.begin_step_anew()


def _open_records(
    config: Config, directory: Path, ranks: Ranks, state: TrainState, dtype: torch.dtype
) -> Recorder | None:
    """Write down on the main rank with what the run starts, and open its records there; None elsewhere.

    A collective. Raises PhaseError on all ranks where nothing can be written.
    """
    devices = devices_of(ranks)
    with ranks.shared_errors("opening the records"), writing_to(directory):
        if not ranks.is_main:
            return None
        checkpoint.finish_save(directory / "checkpoints")  # all ranks have read what it renames
        write_file(directory / "config.yaml", as_yaml(redacted(asdict(config))))
        record_start(directory, ranks.strategy, devices, state.step, dtype)
        return Recorder(config, directory, -1 if state.is_start else state.step)


def _log_on_main(is_main: bool, others: int) -> None:
    """Let the main rank speak, and the others only from the level `others`."""
    logging.getLogger("grpo_dist").setLevel(logging.INFO if is_main else others)
