"""Everything a run holds, put together from its config; train.py uses it and says what happens in what order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..algorithm.hashing import stream_key
from ..algorithm.schedule import learning_rate
from ..algorithm.targets import has_reference
from ..checkpoint import store as checkpoint
from ..checkpoint.guards import BadUpdates, lock, warn_of_slow_save
from ..checkpoint.reopening import check_final, probe
from ..checkpoint.resume import changes, identity, require_same_start, resume_path, with_template_date
from ..checkpoint.state import Position
from ..config.parse import redacted
from ..config.schema import Config, RolloutConfig
from ..data.mixture import load_training
from ..data.prompts import load_prompts
from ..distributed.device import MemoryPeaks, set_up_cuda
from ..distributed.launch_config import require_known_launch
from ..distributed.optimizer_state import OptimizerState
from ..distributed.ranks import PhaseError, Ranks, resolve_dtype, unsharded_loading
from ..distributed.rendezvous import LaunchError, Rendezvous, place_in_launch
from ..distributed.watch import Watch
from ..model.checks import UnfitModel
from ..model.critic import parameter_groups
from ..model.export import save_final
from ..model.load import (
    attention_for,
    check_model_config,
    end_token_ids,
    load_causal_lm,
    load_model_config,
    load_policy,
    load_tokenizer,
    trainable,
    try_blank,
)
from ..model.reference import AdaptersOff, FrozenCopy, Reference, needs_copy
from ..model.rollout_weights import RolloutModel
from ..monitoring.alarms import Metrics
from ..monitoring.console import Display
from ..monitoring.machine import record_start, versions
from ..monitoring.metrics import Clock, read_history
from ..monitoring.recorder import Recorder
from ..monitoring.trackers import require_known
from ..report.card import write_card
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import TrainerState, answer_checks, labels
from ..rollout import Sampling
from ..rollout.choose import UnfitEngine, made_of, make_engine
from ..rollout.own_attention import require_no_noise, settle_attention
from ..rollout.probe import head_is_plain
from ..text.tokens import CompletionTexts
from ..types import Batch, Completion, Prompt
from .first_update import first_update
from .generation import Scoring, generate_and_score, requests_of

log = logging.getLogger(__name__)


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what to do."""


class Run:
    """The parts of a run: ranks, data, models, engine, scorer, files. Opened once, resumed where it can be."""

    def __init__(self, config: Config) -> None:
        set_up_cuda()
        place_in_launch()  # raises where the launch is none
        self.config = config
        self.directory = Path(config.train.output_dir)
        is_main = os.environ.get("RANK", "0") == "0"
        _log_on_main(is_main, others=logging.ERROR)  # as long as all ranks find the same
        try:  # all that a user can have got wrong, before ranks meet and models are loaded
            require_known_launch(os.environ)
            self.resume_from = resume_path(config)
            self._load_data()
            config = self.config
            self.identity = identity(config, self.model_config, self.prompts)
            for change in changes(self.resume_from, config, self.identity) if self.resume_from else ():
                log.warning("%s", change)
            require_known(config.logging.trackers)
            self.scorer = ScorerPool(config.rewards, config.scoring)
            for prompt in (self.prompts[0], *self.eval_prompts[:1]):
                self.scorer.check_columns(prompt.columns)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.directory) if is_main else None
        except (ValueError, OSError, checkpoint.DamagedCheckpoint) as error:
            Rendezvous.fail_before(error)
            raise UserError(str(error)) from error
        self.ranks = Ranks(resolve_dtype(config.model.dtype), config.optim)
        _log_on_main(is_main, others=logging.WARNING)
        config = self._agree_on_data()
        if self.ranks.is_main:
            (self.directory / "config.yaml").write_text(yaml.safe_dump(redacted(asdict(config)), sort_keys=False))
        places = self.ranks.gather_objects(self.resume_from and self.resume_from.name)
        if len(set(places)) > 1:
            raise UserError(f"train.output_dir: ranks see different checkpoints in {self.directory}, {places} in order "
                            "of rank; it must lie on a file system that all nodes share")  # fmt: skip
        try:
            self._load_models()
        except LaunchError:
            raise
        except Exception as error:
            all_know = self.ranks.fail(error)
            if not isinstance(error, (UnfitModel, UnfitEngine)):
                raise
            raise (UserError(str(error)) if all_know else LaunchError(f"rank {self.ranks.rank}: {error}")) from error
        self.position = self._resume() if self.resume_from else Position(0, config.loss.kl_coeff)
        self.rollout_model.sync()
        self.first_update = first_update(config, self.resume_from is not None, self.position.updates)
        self.watch = Watch(self.ranks.rank, self.ranks.num_ranks, self.ranks.store(config.train.hang_timeout_seconds),
                           config.train.max_seconds, config.train.hang_timeout_seconds,
                           lambda: self.ranks.meetings)  # fmt: skip
        self.clock, self.memory = Clock(), MemoryPeaks(self.ranks.device)
        self.failed_saves = 0  # in a row
        self.bad_updates = BadUpdates(self.directory, config.train.max_bad_updates, self.ranks.is_main)
        kept = -1 if self.position.is_start else self.position.step
        self.recorder = Recorder(config, self.directory, kept) if self.ranks.is_main else None
        self.display = Display(config.train.num_train_steps, self.position.step, self.ranks.is_main,
                               config.logging.show_completions_every)  # fmt: skip
        record_start(self.directory, self.ranks, self.position.step, self.policy.causal_lm.dtype)
        self.ranks.end_start()

    def _agree_on_data(self) -> Config:
        """The config with rank 0's template_date, where a run is started about midnight; a collective.

        Raises UserError where ranks were started otherwise all the same.
        """
        date = self.ranks.gather_objects(self.config.data.template_date)[0]
        if date != self.config.data.template_date:
            self.config = replace(self.config, data=replace(self.config.data, template_date=date))
            self._load_data()
            self.identity = identity(self.config, self.model_config, self.prompts)
        start = {"config": redacted(asdict(self.config)), "versions": versions(), "identity": self.identity}
        try:
            require_same_start(self.ranks.gather_objects(start))
        except ValueError as error:
            raise UserError(str(error)) from error
        return self.config

    def _load_data(self) -> None:
        self.tokenizer = load_tokenizer(self.config.model)
        self.config = with_template_date(self.config, self.tokenizer, self.resume_from)
        data = self.config.data
        self.model_config = load_model_config(self.config.model)
        self.longest = data.max_prompt_length + self.config.rollout.max_completion_length
        check_model_config(self.model_config, self.tokenizer, self.longest)
        implementation, _ = attention_for(self.config.model, self.model_config, self.longest)
        if left_out := try_blank(self.config.model, self.config.lora, self.model_config, implementation):
            log.info("adapters: none on %s", left_out)
        checks = answer_checks(self.config.rewards) if data.answer_column else []
        self.prompts, self.sampler = load_training(self.config, self.tokenizer, checks)
        self.eval_prompts: list[Prompt] = []
        if data.eval_file:
            prompts, _ = load_prompts(data.eval_file, data.eval_split, data, self.tokenizer, checks)
            self.eval_prompts = prompts[: self.config.train.num_eval_prompts]
        self.reward_names = labels(self.config.rewards)
        self.end_ids = end_token_ids(self.config.model, self.tokenizer)
        self.texts_of = CompletionTexts(self.tokenizer, self.end_ids)

    def _load_models(self) -> None:
        config = self.config
        dtype = resolve_dtype(config.model.dtype)
        implementation, obstacle = attention_for(config.model, self.model_config, self.longest)
        temperature = config.rollout.temperature
        policy = load_policy(config.model, config.lora, dtype, implementation, temperature, config.train.seed,
                             device=None if self.ranks.zero_stage == 3 else self.ranks.device,
                             has_critic=config.advantage.baseline == "critic",
                             entropy_gradient=config.loss.entropy_coeff > 0)  # fmt: skip
        optimizer = torch.optim.AdamW(
            parameter_groups(policy, config.optim, config.critic),
            lr=config.optim.learning_rate, betas=config.optim.betas, weight_decay=config.optim.weight_decay,
            fused=self.ranks.device.type == "cuda",  # else a step takes as much memory again as what it trains
        )  # fmt: skip
        self.ranks.meet("loaded the model")  # a download may take longer than a collective of the start waits
        self.wrapped, self.optimizer = self.ranks.prepare(policy, optimizer)
        self.wrapped.train()
        self.policy = self.ranks.unwrap(self.wrapped)
        self.state = OptimizerState(self.ranks, self.optimizer, trainable(self.policy))
        self.reference = self._reference(dtype, implementation)
        self.ranks.meet("loaded the reference")
        base = self.reference.policy.causal_lm if isinstance(self.reference, FrozenCopy) else None
        self.rollout_model = RolloutModel(self.policy, dtype, implementation, base)
        with self.rollout_model.open() as model:
            models = [self.policy.causal_lm, *([self.reference.policy.causal_lm] if self.reference else []), model]
            obstacle = settle_attention(models, implementation, obstacle, config.model.attn_implementation != "auto",
                                        self.ranks.gather_objects)  # fmt: skip
        self.share_prompts = obstacle is None
        require_no_noise(self.wrapped, self.policy, self.share_prompts, self.ranks.gather_objects)
        kept = {} if self.resume_from is None else checkpoint.load_meta(self.resume_from)
        with self.rollout_model.open() as model:
            plain = head_is_plain(model, self.share_prompts)
            self.engine = make_engine(model, obstacle, self.end_ids,
                                      self._rollout_to_go_on_with(kept), self.ranks.gather_objects,
                                      kept.get("decoding"))  # fmt: skip
        for each in (self.policy, *([self.reference.policy] if self.reference else [])):  # may be one
            each.fused_head = plain and isinstance(each.causal_lm.get_output_embeddings(), torch.nn.Linear)

    def _reference(self, dtype: torch.dtype, implementation: str | None) -> Reference | None:
        """The policy itself, adapters off, or a copy; None where nothing depends on it. `dtype` is the policy's."""
        config, copy_dtype = self.config, resolve_dtype(self.config.reference.dtype)
        if not has_reference(config):
            return None
        if not needs_copy(config, dtype, copy_dtype, self.ranks.zero_stage):
            return AdaptersOff(self.wrapped, self.policy)
        with unsharded_loading():
            copy = load_causal_lm(config.model, copy_dtype, implementation, self.ranks.device)
        return FrozenCopy(copy, config.rollout.temperature)

    # --- resuming and saving -------------------------------------------------------------------------------------

    def _rollout_to_go_on_with(self, kept: dict[str, Any]) -> RolloutConfig:
        """The config's, but that a run goes on with the engine a trial once chose, as a checkpoint's metadata has kept:
        the other would round otherwise."""
        rollout = self.config.rollout
        return rollout if rollout.engine != "auto" else replace(rollout, engine=kept.get("engine", "auto"))

    def _resume(self) -> Position:
        assert self.resume_from is not None
        problem = None
        try:
            tensors, meta = checkpoint.load(self.resume_from)
            self.state.restore(tensors)
            self.sampler.restore(meta["sampler"])
            position = Position.restored(tensors, meta, self.prompts)
        except (checkpoint.DamagedCheckpoint, TypeError, ValueError, LookupError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"  # although its checksums are right
        if problem := next(filter(None, self.ranks.gather_objects(problem)), None):
            raise UserError(f"{self.resume_from} does not fit this run ({problem}): {checkpoint.CHANGED}")
        log.info("resumed from %s", self.resume_from)
        if self.config.loss.kl_target is None:  # the coefficient is the config's, which may have been changed
            position.kl_coeff = self.config.loss.kl_coeff
        return position

    def save(self, *, may_fail: bool = False) -> None:
        """Commit a checkpoint of the position; a collective. Raises PhaseError where that fails and either may not
        (`may_fail`) or has failed more often in a row than train.max_failed_saves."""
        begun = time.monotonic()
        self.watch.phase = "save"
        state = self.state.collect() | self.position.tensors()
        meta = self.position.meta() | made_of(self.engine) | {
            "identity": self.identity, "config": redacted(asdict(self.config)), "versions": versions(),
            "sampler": self.sampler.state(), "dtype": str(self.policy.causal_lm.dtype).removeprefix("torch."),
        }  # fmt: skip
        try:
            with self.ranks.together("saving a checkpoint"), self.watch.patience():
                if self.ranks.is_main:
                    checkpoint.save(self.directory / "checkpoints", self.position.step, state, meta,
                                    self.config.train.keep_checkpoints)  # fmt: skip
        except PhaseError as error:
            self.failed_saves += 1
            if not may_fail or self.failed_saves > self.config.train.max_failed_saves:
                raise
            log.warning("going on without a checkpoint of step %d, the %d. in a row (train.max_failed_saves: %d): %s",
                        self.position.step, self.failed_saves, self.config.train.max_failed_saves,
                        str(error).splitlines()[-1])  # fmt: skip
            return
        self.failed_saves = 0
        warn_of_slow_save(time.monotonic() - begun)

    def save_final(self) -> Path:
        """Write the merged model, the tokenizer and the adapter to output_dir/final; a collective."""
        directory = self.directory / "final"
        self.watch.phase = "export"
        with self.watch.patience():
            with self.rollout_model.open() as model:
                expected = probe(model) if self.ranks.is_main else None
            save_final(self.policy, self.tokenizer, directory, self.ranks.is_main)
            if expected is not None:
                history, options = read_history(self.directory), redacted(asdict(self.config))
                write_card(directory, options, history, self.position.step, "merged")
                if self.config.lora:
                    write_card(directory / "adapter", options, history, self.position.step, "adapter")
                check_final(directory, expected, self.rollout_model.dtype, self.config.model.trust_remote_code)
            self.ranks.barrier()
        return directory

    # --- the phases' tools ---------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0."""
        yield from range(self.position.step, self.config.train.num_train_steps)

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step's batch, the same on all ranks."""
        return [self.prompts[i] for i in self.sampler.batch_indices(step)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show and time a phase of the step."""
        self.display.phase(name)
        self.watch.phase = name
        with self.clock.phase(name), self.memory.phase(name):
            yield

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.config.train.num_train_steps, self.config.optim)

    @property
    def sampling(self) -> Sampling:
        """How training completions are drawn."""
        rollout = self.config.rollout
        return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)

    def generate(
        self, prompts: list[Prompt], group_size: int, sampling: Sampling, stream: str, step: int
    ) -> tuple[list[Completion], Scoring]:
        """This rank's share of the completions, and scores, which are computed while others are generated.

        Needs the rollout weights in place; `stream` names the noise, such as `train/12`; `step` is told to rewards.
        """
        drawn = self.ranks.share(len(prompts) * group_size)
        requests = requests_of(prompts, group_size, drawn, self.config.train.seed, stream)
        state = TrainerState(step, self.config.train.num_train_steps, self.sampler.epoch(step))
        with self.rollout_model.open() as model, self.ranks.together("rollout"):
            scoring = Scoring(self.scorer, prompts, group_size, drawn, self.texts_of, state)
            return generate_and_score(self.engine, model, requests, sampling, scoring, self.watch.check), scoring

    def dropout_key(self, step: int) -> int:
        """What tells the adapters' dropout of the next update from any other's."""
        return stream_key(self.config.train.seed, "dropout", step, self.position.updates)

    def completion_texts(self, batch: Batch) -> list[str]:
        """All completions of a batch as text."""
        return self.texts_of([ids.tolist() for ids in torch.split(batch.tokens, batch.lengths.tolist())])

    def write(self, metrics: Metrics, batch: Batch | None = None, advantages: Tensor | None = None) -> None:
        """Write down one step's metrics and completions, on the main rank."""
        if self.recorder:
            step = int(metrics["step"] or 0)
            due = self.config.logging.log_completions or self.display.shows_completions(step)
            if due and batch is not None and advantages is not None:
                texts = self.completion_texts(batch)
                self.recorder.completions(step, batch, texts, advantages, self.reward_names)
                self.display.completions(step, batch, texts, advantages)
            new = self.recorder.metrics(metrics)
            self.display.alarms(new, self.recorder.alarms.ringing)

    def summary(self) -> str:
        """What the run achieved and where it lies."""
        lines = []
        evaluations = [entry for entry in read_history(self.directory) if "eval/accuracy" in entry]
        if len(evaluations) > 1:
            first, last = evaluations[0], evaluations[-1]
            lines.append(f"held-out accuracy, sampled: {first['eval/accuracy']:.3f} before (step {first['step']}), "
                         f"{last['eval/accuracy']:.3f} after (step {last['step']})")  # fmt: skip
        lines += [f"trained model:  {self.directory / 'final'}", f"metrics:        {self.directory / 'metrics.jsonl'}"]
        if (self.directory / "report.html").exists():
            lines.append(f"report:         {self.directory / 'report.html'}")
        if "tensorboard" in self.config.logging.trackers:
            lines.append(f"curves:         tensorboard --logdir {self.directory / 'tensorboard'}")
        lines += [f"talk to it:     python -m grpo_dist chat {self.directory}",
                  f"take it home:   python -m grpo_dist export {self.directory}",
                  "next:           python -m grpo_dist init own.yaml (a config for a task of your own)"]  # fmt: skip
        return "\n".join(lines)

    def close(self, all_ranks: bool) -> None:
        """End the workers, close the files and, unless other ranks may be stuck, leave the process group."""
        self.watch.close()
        if all_ranks:  # rank 0 serves what the others watch: it stays until nobody does
            self.ranks.barrier()
        self.display.close()
        self.scorer.close()
        if self.recorder:
            self.recorder.close()
        if all_ranks:
            self.ranks.end()


def _log_on_main(is_main: bool, others: int) -> None:
    """Let the main rank speak, and the others only from the level `others`."""
    logging.getLogger("grpo_dist").setLevel(logging.INFO if is_main else others)
