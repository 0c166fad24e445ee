"""Evaluate a model on a data set: unbiased pass@k, maj@k, mean reward, with intervals, on any number of ranks.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m grpo_dist.evaluate \
        --model runs/quickstart/final --data configs/data/math_tasks_eval.jsonl --n 16 --config configs/quickstart.yaml
    python -m grpo_dist evaluate --model toy --data … --n 16 --compare runs/other/evaluation         # one process

Rewards, columns and sampling are those of a training config. Every sample is a function of the seed, its prompt and its
number, so the ranks change nothing. Samples are saved in parts as they come, and the same command goes on after the
last part; it is refused if the file of a reward has changed. Nothing is trained. Every rank loads the complete model. A
PEFT adapter is evaluated on its base.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from .config.evaluation import read_options
from .config.parse import is_first_rank, let_first_rank_answer
from .distributed import process

if __name__ == "__main__":
    process.begin()
    # before the imports of torch, so that the answer to a mistake in an option comes at once
    read_options()

from .checkpoint.resume import columns_fingerprint
from .config.places import writing_to
from .config.schema import Config, ReferenceConfig
from .distributed.deepspeed import unsharded_loading
from .distributed.device import resolve_dtype, set_up_cuda
from .distributed.launch import place_in_launch, tell_error_of_start
from .distributed.launch_config import require_known_launch
from .distributed.ranks import PhaseError, Ranks
from .distributed.watch import Interrupted
from .model.adapter import to_evaluate
from .model.adapter_values import fingerprint
from .model.config_files import (
    check_model_config,
    end_token_ids,
    ignored_generation_options,
    load_model_config,
    load_tokenizer,
    short_window,
)
from .model.files import UnfitModel, model_path
from .model.load import attention_for, base_identity, load_causal_lm, load_policy
from .model.stored_weights import weights_fingerprint
from .monitoring.console import set_up_logging
from .monitoring.progress import Progress
from .report.categories import categories
from .report.evaluation import IDENTITY, Rows, read_identity, report, rows_of, samples
from .rewards.pool.pool import ScorerPool
from .rewards.registry import EPISODE_COLUMNS, answer_reader, file_digests
from .rewards.scores import right_above
from .rewards.text import CONVERSATION, answering_texts
from .rollout import Engine, LoadedModel, awake
from .rollout.choose import UnfitEngine, make_engine
from .rollout.own_attention import settle_attention
from .rollout.playing import episodes_of, open_host, prompt_reader, sample_or_play, templated
from .rollout.sampling import sampling_with
from .rollout.vllm.policy import ServedRun
from .rollout.vllm.start import make_vllm_engine
from .text.files import write_file
from .text.output import printing_results
from .text.plain import plain_lines, write_lines
from .text.templates import today, uses_date
from .text.tokens import CompletionTexts
from .trainer.gathering import RewardFailure, gather_scores, gather_trajectories
from .trainer.scoring import Scoring, requests_of
from .types import Batch, Prompt, Trajectory

log = logging.getLogger(__name__)

_PROMPTS_A_PART = 64  # a part is the same whatever the number of ranks
_SHOWN_CHARACTERS = 80
_LATER = ("environment", "files of the environment", "answers and other columns")
"""What evaluations of older versions have not kept, and is not known to have changed."""


class Evaluation:
    """Data, model and rewards of one evaluation; `run` is a collective."""

    def __init__(
        self, config: Config, num_samples: int, directory: Path, category: str | None, compared: Path | None = None
    ) -> None:
        """`compared` is the output of an evaluation with which this one is to be compared. Raises ValueError or OSError
        for what a user can have got wrong, before the model is loaded."""
        self.num_samples, self.directory = num_samples, directory
        self.engine: Engine | None = None
        config = to_evaluate(config)
        self.tokenizer = load_tokenizer(config.model)
        self.config = config = templated(self._dated(config, compared))
        data = config.data
        self.model_config = load_model_config(config.model)
        check_model_config(self.model_config, self.tokenizer, config.max_sequence_length)
        self.host = open_host(config)
        assert data.eval_file is not None
        split = "train" if Path(data.eval_file).is_file() else data.eval_split
        self.prompts, _ = prompt_reader(config, self.tokenizer, self.host).load(data.eval_file, split)
        self.categories: dict[int, str] = {}
        if category is not None:
            names = categories([prompt.columns for prompt in self.prompts], category)
            self.categories = {prompt.index: name for prompt, name in zip(self.prompts, names, strict=True)}
        if compared is not None:
            self._require_common_prompts(compared)
        self._claim(compared)
        samples(self.directory)  # raises for a damaged part, before the model is loaded
        self.end_ids = end_token_ids(config.model, self.tokenizer)
        self.texts_of = CompletionTexts(self.tokenizer, self.end_ids)
        ignored = ignored_generation_options(config.model, config.rollout)
        if ignored and is_first_rank():
            log.info("%s", ignored)
        self.sampling = sampling_with(config.rollout, self.tokenizer, self.end_ids, self.model_config)
        self.scorer = ScorerPool(config.rewards, config.scoring)
        self.scorer.check_columns([*self.prompts[0].columns, *(EPISODE_COLUMNS if self.host else ())])
        self.episodes = episodes_of(config, self.host, self.tokenizer, self.end_ids)
        self.read_answer: Callable[[str], str | None] | None = answer_reader(config.rewards)

    def _dated(self, config: Config, compared: Path | None) -> Config:
        """The config with the date that a template which writes one was given when this evaluation began, or the one
        with which it is compared: another day's prompts are others."""
        if config.data.template_date is not None or not uses_date(self.tokenizer):
            return config
        folders = [folder for folder in (self.directory, compared) if folder is not None]
        saved = [(read_identity(folder) or {}).get("template_date") for folder in folders]
        return replace(config, data=replace(config.data, template_date=next(filter(None, saved), None) or today()))

    def _require_common_prompts(self, compared: Path) -> None:
        """Raise ValueError where another evaluation has none of this one's prompts."""
        theirs = {(row["prompt_index"], row["prompt"]) for row in samples(compared)}
        if theirs.isdisjoint((prompt.index, prompt.text) for prompt in self.prompts):
            texts = [text[:_SHOWN_CHARACTERS] for text in (min(theirs)[1] if theirs else "", self.prompts[0].text)]
            raise ValueError(
                f"--compare: {compared} has none of these prompts. Its first one begins {texts[0]!r}, and this one's "
                f"{texts[1]!r}: both need the same data, prompt column and chat template"
            )

    def _claim(self, compared: Path | None) -> None:
        """Refuse a directory that holds another evaluation, whose samples would be taken for this one's. Say where the
        one that this one is compared with was scored by other rewards."""
        config = self.config
        identity = {
            "model": base_identity(config.model, self.model_config), "num_samples": self.num_samples,
            "weights": weights_fingerprint(Path(model_path(config.model))),
            # another server may draw the rest
            "rollout": {name: value for name, value in asdict(config.rollout).items() if name != "vllm"},
            "rewards": [asdict(reward) for reward in config.rewards],
            "files of rewards": file_digests(reward.name for reward in config.rewards),
            "environment": config.environment and asdict(config.environment),
            "files of the environment": file_digests(config.environment.own_code if config.environment else ()),
            "answers and other columns": columns_fingerprint(self.prompts),
            "seed": config.train.seed, "num_prompts": len(self.prompts),
            "template_date": config.data.template_date,
            "prompts": hashlib.sha256(repr([(p.index, p.ids) for p in self.prompts]).encode()).hexdigest(),
        }  # fmt: skip
        if config.lora is not None and config.lora.init_from is not None:
            identity["adapter"] = fingerprint(config.lora.init_from)
        identity = json.loads(json.dumps(identity))  # as it is read back
        saved = {key: identity[key] for key in _LATER} | (read_identity(self.directory) or identity)
        changed = [key for key in identity if saved.get(key) != identity[key]]
        if changed and samples(self.directory):  # one that has ended at a mistake has none
            raise ValueError(f"{self.directory} holds another evaluation ({', '.join(changed)} differ): choose another "
                             "--output, or remove it")  # fmt: skip
        if is_first_rank():
            theirs = None if compared is None else read_identity(compared)
            if theirs and any(theirs.get(key) != identity[key] for key in ("rewards", "files of rewards")):
                log.warning("--compare: %s was scored by other rewards, or by other versions of them", compared)
            self.directory.mkdir(parents=True, exist_ok=True)
            write_file(self.directory / IDENTITY, json.dumps(identity, indent=1))

    def run(self, ranks: Ranks) -> Rows:
        """Sample and score what is not there yet, and return a row for each prompt."""
        ranks.end_start()
        parts = range(0, len(self.prompts), _PROMPTS_A_PART)
        missing = ranks.gather_objects([start for start in parts if not self._path(start).exists()])[0]
        if missing:
            self._load_model(ranks)
        for start in missing:
            prompts = self.prompts[start : start + _PROMPTS_A_PART]
            rows = self._rows(prompts, self._sample(ranks, prompts, start))
            with ranks.shared_errors("writing samples"), writing_to(self.directory, "--output"):
                if ranks.is_main:
                    write_file(self._path(start), "".join(f"{json.dumps(row)}\n" for row in rows))
        ranks.barrier()
        rows = [row for start in parts for row in rows_of(self._path(start))]
        return [row | {"category": self.categories.get(row["prompt_index"])} for row in rows]  # perhaps another column

    def _path(self, start: int) -> Path:
        return self.directory / f"samples_{start:07d}.jsonl"

    def _load_model(self, ranks: Ranks) -> None:
        config, dtype = self.config, resolve_dtype(self.config.model.dtype)
        implementation, obstacle = attention_for(config.model, self.model_config, config.max_sequence_length)
        with unsharded_loading():
            policy = None
            if config.lora is not None:
                policy = load_policy(config.model, config.lora, dtype, implementation, device=ranks.device)
            plain = policy.causal_lm if policy else load_causal_lm(config.model, dtype, implementation, ranks.device)
        model = plain.eval()
        ranks.wait_at("loaded the model")  # a download may take longer than a collective of the start waits
        window = short_window(self.model_config, config.max_sequence_length)
        obstacle = settle_attention([model], implementation, obstacle, config.model.attn_implementation != "auto",
                                    ranks.gather_objects, window)  # fmt: skip
        weights = LoadedModel(model)
        if config.rollout.engine == "vllm":
            self.engine = make_vllm_engine(ServedRun(self._served(), ranks, weights, policy, self.end_ids))
            self.engine.update_weights()  # the probe
        else:
            self.engine = make_engine(weights, obstacle, self.end_ids, config.rollout, ranks.gather_objects)

    def _served(self) -> Config:
        """The config for servers of the model as it is, whose files are the evaluation's."""
        train = replace(self.config.train, output_dir=str(self.directory))
        return replace(self.config, reference=ReferenceConfig(), train=train)

    def close(self) -> None:
        """End the processes that it has started."""
        self.scorer.close()
        if self.host:
            self.host.close()
        if self.engine is not None:
            self.engine.close()

    def _sample(self, ranks: Ranks, prompts: list[Prompt], start: int) -> Batch:
        seed = self.config.train.seed
        drawn = ranks.share(len(prompts) * self.num_samples)
        requests = requests_of(prompts, self.num_samples, drawn, seed, "evaluate", first=start)
        assert self.engine is not None, "_load_model makes it"
        with awake(self.engine), ranks.shared_errors("sampling"):
            scoring = Scoring(self.scorer, prompts, self.num_samples, drawn, self.texts_of,
                              has_episodes=self.episodes is not None)  # fmt: skip
            name = f"prompts {start + 1} to {start + len(prompts)} of {len(self.prompts)}"
            say = log.info if ranks.is_main else log.debug
            say("%s: drawing %d completions", name, len(requests))
            progress = Progress(name, len(requests), say)

            def on_finish(ended: list[Trajectory]) -> None:
                scoring.on_finish(ended)
                progress.add(len(ended))

            trajectories = sample_or_play(self.engine, self.episodes, requests, prompts, self.sampling, on_finish)
        batch = gather_trajectories(ranks, prompts, trajectories, has_episodes=self.episodes is not None)
        scoring.complete(batch)
        with ranks.shared_errors("scoring"):
            scores = scoring.result()
        config = self.config
        return gather_scores(ranks, batch, scoring.rows, scores, config.weights_at(0), config.scoring.error_budget)

    def _rows(self, prompts: list[Prompt], batch: Batch) -> Rows:
        right = (batch.reward > right_above(self.config.weights_at(0))).tolist()
        conversations = batch.extras.get(CONVERSATION)
        rows: Rows = []
        for group, prompt in enumerate(prompts):
            places = (batch.group == group).nonzero()[:, 0].tolist()
            texts = self.texts_of([batch.completion_ids(n) for n in places], goes_on=prompt.messages is None)
            talks = [conversations[n] for n in places] if conversations else None
            rows.append({
                "prompt_index": prompt.index, "prompt": prompt.text,
                "category": self.categories.get(prompt.index),
                "completions": texts, "tokens": batch.lengths[places].tolist(),
                "finished": batch.finished[places].tolist(), "right": [right[n] for n in places],
                "rewards": [None if math.isnan(reward) else reward for reward in batch.reward[places].tolist()],
                "answers": [self.read_answer(text) for text in answering_texts(texts, talks)] if self.read_answer
                else None,
                **({"conversations": [json.loads(talk) for talk in talks]} if talks else {}),
            })  # fmt: skip
        return rows


def main() -> int:
    """The command line."""
    return evaluate(*read_options())


def evaluate(options: argparse.Namespace, config: Config) -> int:
    """Evaluate, print the tables on the first rank, and return the exit status; a collective."""
    set_up_logging()
    try:
        set_up_cuda()
        place_in_launch()  # raises where the launch is none
        require_known_launch(os.environ)
        evaluation = Evaluation(config, options.n, options.output, options.category, options.compare)
        ranks = Ranks(resolve_dtype(config.model.dtype), config.optim)
    except (ValueError, OSError) as error:
        tell_error_of_start(error)
        return 2
    status = 0
    try:
        rows = evaluation.run(ranks)
    except (UnfitModel, UnfitEngine, Interrupted, PhaseError, RewardFailure) as error:  # raised on all ranks alike
        if ranks.is_main:
            write_lines(plain_lines(f"error: {error}"), sys.stderr)
        status = 2 if isinstance(error, UnfitModel | UnfitEngine) else 1
    finally:
        evaluation.close()
        is_main = ranks.is_main
        ranks.end()
    if status:
        let_first_rank_answer("RANK")
    elif is_main:
        try:
            with printing_results():
                report(rows, options.n, options.compare, options.output, options.category)
        except (ValueError, OSError) as error:
            write_lines(plain_lines(f"error: {error}"), sys.stderr)
            return 1
    return status


if __name__ == "__main__":
    process.run_to_the_end(main)
