"""What a run resumes from, which options may have changed since, and what the others are refused with."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_disk import config_of

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.final import write_record
from grpo_dist.checkpoint.resume import (
    MAY_CHANGE,
    NEEDED,
    changes,
    changes_of_batches,
    identity,
    require_same_start,
    resume_path,
    resumed_kl_coeff,
)
from grpo_dist.config.files import as_yaml
from grpo_dist.config.schema import Config
from grpo_dist.rewards.registry import file_digests
from grpo_dist.trainer.build import UserError, build
from grpo_dist.trainer.models import engine_to_keep
from grpo_dist.types import Prompt


def blank_meta() -> dict[str, Any]:
    """Metadata that has all it needs, and nothing in it."""
    return {name: kind() if isinstance(kind, type) else kind[0]() for name, kind in NEEDED.items()}


def saved(config: Config, step: int) -> Path:
    """A checkpoint that the config's run might have left."""
    from grpo_dist.model.config_files import load_model_config

    now = identity(config, load_model_config(config.model), [])
    meta = blank_meta() | {"identity": now, "config": asdict(config)}
    del meta["step"]
    return checkpoint.save(Path(config.train.output_dir) / "checkpoints", step, {"x": torch.zeros(4)}, meta, keep=9)


@pytest.mark.parametrize(
    ("asked", "kept", "taken"),
    [("auto", "paged", "paged"), ("auto", "native", "native"), ("native", "paged", "native"), ("auto", None, "auto")],
)
def test_a_run_goes_on_with_the_engine_of_its_trial(asked: str, kept: str | None, taken: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, "--rollout.engine", asked)
    meta = {"engine": kept} if kept else {}
    saved_at = checkpoint.save(tmp_path / "checkpoints", 1, {"x": torch.zeros(4)}, meta, keep=9)
    assert engine_to_keep(config.rollout, checkpoint.load_meta(saved_at)) == replace(config.rollout, engine=taken)


def test_a_damaged_checkpoint_falls_back_or_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path)
    first, second = saved(config, 1), saved(config, 2)
    file = second / checkpoint.TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert resume_path(config) == first
    assert str(file) in caplog.text
    with pytest.raises(checkpoint.DamagedCheckpoint, match="damaged"):
        resume_path(config_of(tmp_path, "--train.resume", str(second)))
    with pytest.raises(UserError, match="damaged"):
        build(config_of(tmp_path, "--train.resume", str(second)))
    with pytest.raises(ValueError, match="holds checkpoints"):
        resume_path(config_of(tmp_path, "--train.resume", "never"))


def test_what_is_no_whole_checkpoint_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path)
    first, second = saved(config, 1), saved(config, 2)
    (second / checkpoint.MANIFEST).unlink()
    (first.parent / "tmp_3").mkdir()
    assert resume_path(config) == first
    assert str(second) in caplog.text and str(first.parent / "tmp_3") in caplog.text


def test_a_checkpoint_whose_save_was_cut_short_keeps_its_name(tmp_path: Path) -> None:
    """Killed between the two renames, the same command goes on, whether it names the step or not."""
    first, second = (saved(config_of(tmp_path), step) for step in (1, 2))
    new = first.parent / "tmp_2"
    shutil.copytree(second, new)
    second.rename(first.parent / "tmp_replaced_2")
    assert resume_path(config_of(tmp_path)) == new
    assert resume_path(config_of(tmp_path, "--train.resume", str(second))) == new
    assert resume_path(config_of(tmp_path, "--train.resume", str(first))) == first
    (new / checkpoint.TENSORS).unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match="tmp_2"):
        resume_path(config_of(tmp_path, "--train.resume", str(second)))


def test_a_checkpoint_that_lacks_something_is_damaged(tmp_path: Path) -> None:
    """Its checksums fit: it was written so."""
    config = config_of(tmp_path)
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"x": torch.zeros(4)}, {"identity": {}}, keep=9)
    with pytest.raises(UserError, match="lacks"):
        build(config)
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, {"x": torch.zeros(4)},
                    blank_meta() | {"step": 2, "identity": [], "metrics": 1}, keep=9)  # fmt: skip
    with pytest.raises(UserError, match="lacks metrics, identity"):
        build(config)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lora.alpha", "8"), "lora.alpha: 32.0 -> 8.0"),
        (("--train.seed", "7"), "train.seed: 0 -> 7"),
        (("--train.batch_size", "31"), "train.batch_size: 32 -> 31"),
        (("--data.train_file", "{a.jsonl: 1, b.jsonl: 2}"), "order.weights: None -> [1.0, 2.0]"),
        (("--data.curriculum", "{low: 0.1}"), "data.curriculum.low: None -> 0.1"),
    ],
)
def test_changes_that_make_another_run_are_refused(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    before = config_of(tmp_path)
    path, model_config = saved(before, 1), load_model_config(before.model)
    after = config_of(tmp_path, *arguments)
    with pytest.raises(ValueError, match=re.escape(told)):
        changes(path, after, identity(after, model_config, []))
    forced = config_of(tmp_path, *arguments, "--train.allow_changes", "true")
    assert any(told in line for line in changes(path, forced, identity(forced, model_config, [])))


@pytest.mark.parametrize(
    ("arguments", "told", "reason"),
    [
        (("--lora.r", "8"), "lora.r: 32 -> 8", "another lora.r"),
        (("--lora", "null"), "lora.r: 32 -> None", "lora is null"),
        (("--advantage.baseline", "critic"), "options that differ: advantage.baseline: 'mean' -> 'critic'", "no value"),
        (("--optim.optimizer", "muon"), "optim.optimizer: 'adamw' -> 'muon'", "another optim.optimizer"),
    ],
)
def test_changes_that_no_checkpoint_fits_are_refused_always(
    arguments: tuple[str, ...], told: str, reason: str, tmp_path: Path
) -> None:
    from grpo_dist.model.config_files import load_model_config

    before = config_of(tmp_path)
    path, model_config = saved(before, 1), load_model_config(before.model)
    for more in ((), ("--train.allow_changes", "true")):
        after = config_of(tmp_path, *arguments, *more)
        with pytest.raises(ValueError, match=rf"(?s){re.escape(told)}.*{reason}.*export") as refused:
            changes(path, after, identity(after, model_config, []))
        assert "allow_changes" not in str(refused.value)


def test_another_data_set_or_base_model_is_another_run(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config
    from grpo_dist.types import Prompt

    config = config_of(tmp_path)
    model_config = load_model_config(config.model)
    path = saved(config, 1)
    other_data = identity(config, model_config, [Prompt(0, [1, 2], "", None, {})])
    with pytest.raises(ValueError, match=r"data: .* -> .*\n *num_prompts: 0 -> 1\n *no option differs: a file has"):
        changes(path, config, other_data)
    cut = config_of(tmp_path, "--data.max_prompt_length", "9", "--train.allow_changes", "false")
    with pytest.raises(ValueError, match=r"0 -> 1\n *options that differ: data.max_prompt_length: 64 -> 9"):
        changes(path, cut, other_data)
    other = identity(config, model_config, []) | {"base_weights": "another model saved in its place"}
    with pytest.raises(ValueError, match=r"base_weights: .* -> 'another model"):
        changes(path, config, other)
    size = model_config.hidden_size
    model_config.hidden_size *= 2
    with pytest.raises(ValueError, match=rf"run:\n  base\.config\.hidden_size: {size} -> {2 * size}\n  no option"):
        changes(path, config, identity(config, model_config, []))
    starts = [{"identity": identity(config, rank, [])} for rank in (load_model_config(config.model), model_config)]
    with pytest.raises(ValueError, match=rf"nodes: identity\.base\.config\.hidden_size: {size} -> {2 * size}$"):
        require_same_start(starts)


def test_fewer_steps_than_were_made_are_refused(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    config = config_of(tmp_path)
    now = identity(config, load_model_config(config.model), [])
    meta = blank_meta() | {"identity": now, "config": asdict(config), "updates": 1}  # of the third step
    del meta["step"]
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 2, {"x": torch.zeros(4)}, meta, keep=9)
    changes(path, config_of(tmp_path, "--train.num_train_steps", "3"), now)
    with pytest.raises(ValueError, match=r"num_train_steps: 2 given, but the run has come to step 3 in .*step_2:"):
        changes(path, config_of(tmp_path, "--train.num_train_steps", "2"), now)


def test_a_checkpoint_to_resume_from_is_named_by_its_directory(tmp_path: Path) -> None:
    path = saved(config_of(tmp_path), 1)
    for given in ("latest", str(tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"train.resume: '{given}' given, expected auto.*such as {path}$"):
            resume_path(config_of(tmp_path, "--train.resume", given))


def test_the_same_command_goes_on_from_what_it_has_written(tmp_path: Path) -> None:
    """It named another checkpoint when it began; another command begins there anew."""
    first = saved(config_of(tmp_path, "--train.output_dir", str(tmp_path / "first")), 5)
    words = ("--train.resume", str(first))
    assert resume_path(config_of(tmp_path, *words)) == first
    newest = saved(config_of(tmp_path, *words), 6)
    assert resume_path(config_of(tmp_path, *words)) == newest
    assert resume_path(config_of(tmp_path, *words, "--optim.learning_rate", "1e-4")) == first


def test_what_makes_completions_unfit_for_the_rest_of_the_run(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    config = config_of(tmp_path)
    model_config = load_model_config(config.model)
    before = {"config": json.loads(json.dumps(asdict(config))), "identity": identity(config, model_config, [])}
    meta = {**before, "updates": 0}
    for words, is_unfit in {
        ("--rollout.lag", "1"): True, ("--rollout.group_size", "4"): True, ("--rollout.drafts", "false"): False,
        ("--rewards", "[{name: math, weight: 2}]"): True, ("--rewards", "[{name: math, timeout_seconds: 9}]"): False,
        ("--loss.clip_high", "0.1"): False, ("--train.seed", "3"): True, ("--train.updates_per_batch", "2"): False,
        (): False,
    }.items():  # fmt: skip
        after = config_of(tmp_path, *words)
        assert bool(changes_of_batches(meta, after, identity(after, model_config, []))) is is_unfit, words
    after = config_of(tmp_path, "--train.updates_per_batch", "2")  # of a step that is under way
    assert changes_of_batches({**meta, "updates": 1}, after, meta["identity"]) == ["train.updates_per_batch: 1 -> 2"]


def test_a_changed_kl_coefficient_counts(tmp_path: Path) -> None:
    """Only one that was adapted to a target goes on from where it was."""
    target = ("--loss.kl_target", "0.01")
    for before, after, expected in (
        ((), target, 0.04), (target, target, 0.03), (target, (), 0.04), (target, (*target, "--loss.kl_coeff", "1"), 1),
        (("--loss.kl_coeff", "0"), target, 0.04), ((), ("--loss.kl_coeff", "0"), 0),
    ):  # fmt: skip
        meta = {"config": asdict(config_of(tmp_path, *before)), "kl_coeff": 0.03}
        assert resumed_kl_coeff(meta, config_of(tmp_path, *after).loss) == expected


def test_other_changes_are_listed(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    config = config_of(tmp_path)
    path = saved(config, 1)
    after = config_of(tmp_path, "--optim.learning_rate", "2e-4", "--train.num_train_steps", "99")
    told = "\n".join(changes(path, after, identity(after, load_model_config(after.model), [])))
    assert "optim.learning_rate: 0.001 -> 0.0002" in told and "train.num_train_steps: 60 -> 99" in told
    assert "the version differs from the checkpoint's" in told  # the checkpoint above names none
    late = config_of(tmp_path, "--logging.profile_step", "1")
    told = "\n".join(changes(path, late, identity(late, load_model_config(late.model), [])))
    assert "logging.profile_step, to no effect: step 1 is done already" in told


def test_other_answers_and_other_evaluations_are_listed(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config
    from grpo_dist.types import Prompt

    config = config_of(tmp_path)
    model_config = load_model_config(config.model)

    def now(answer: Any, *held_out: int) -> dict[str, Any]:
        prompts = [Prompt(0, [1, 2], "", columns={"answer": answer, "seen": object()})]
        return identity(config, model_config, prompts, [Prompt(0, list(held_out), "")])

    meta = blank_meta() | {"identity": now("3", 4), "config": asdict(config)}
    del meta["step"]
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"x": torch.zeros(4)}, meta, keep=9)
    expected = {
        ("3", 4): (),
        ("4", 4): ("answers",),
        ("3", 5): ("data.eval_file",),
        (date(2026, 1, 2), 4): ("answers",),
    }
    for given, parts in expected.items():
        told = [line for line in changes(path, config, now(*given)) if "version" not in line]
        assert len(told) == len(parts) and all(part in line for part, line in zip(parts, told, strict=True))


@pytest.mark.parametrize("words", [
    ("--rewards", "[{name: 'own_task:it'}]"),
    ("--environment", "{tools: ['own_task:it']}"),
    ("--environment", "{factory: {one: 'own_task:it'}}"),
], ids=["reward", "tool", "environment"])  # fmt: skip
@pytest.mark.parametrize("key", ["files", "reward_files"])
def test_another_version_of_the_users_code_is_listed_and_makes_batches_unfit(
    words: tuple[str, ...], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that a checkpoint has was rewarded, or played, by the version before."""
    from grpo_dist.model.config_files import load_model_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text("def it(completions, **columns): ...")
    config = config_of(tmp_path, *words)
    now = identity(config, load_model_config(config.model), [])
    files = file_digests(config.own_code)
    meta = blank_meta() | {"identity": now, "config": json.loads(json.dumps(asdict(config))), key: files}
    del meta["step"]
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"x": torch.zeros(4)}, meta, keep=9)
    assert not any("own_task" in line for line in changes(path, config, now))
    assert changes_of_batches(meta, config, now) == []
    (tmp_path / "own_task.py").write_text("def it(completions, **columns): return 1")
    assert "changed since the checkpoint: the file of own_task:it" in changes(path, config, now)
    assert changes_of_batches(meta, config, now) == ["the file of own_task:it"]


def test_corrected_answers_make_batches_unfit(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    config = config_of(tmp_path)
    before, after = (
        identity(config, load_model_config(config.model), [Prompt(0, [1], "1 + 1", columns={"answer": answer})])
        for answer in ("3", "2")
    )
    meta = {"config": json.loads(json.dumps(asdict(config))), "identity": before, "updates": 1}
    assert changes_of_batches(meta, config, before) == []
    assert changes_of_batches(meta, config, after) == [MAY_CHANGE["columns"]]


def run_of(directory: Path, steps: int, *words: str) -> Config:
    """A config whose run has made so many steps in a directory, and has no checkpoint."""
    config = config_of(directory, "--train.save_every", "2", "--train.num_train_steps", "9", *words)
    run = Path(config.train.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(as_yaml(asdict(config)))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(steps + 1)))
    return config


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("folder", [True, False], ids=["empty folder", "no folder"])
def test_a_training_whose_checkpoints_are_gone_is_not_overwritten(resume: str, folder: bool, tmp_path: Path) -> None:
    config = run_of(tmp_path, 3, "--train.resume", resume)
    run = Path(config.train.output_dir)
    if folder:
        (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has a training of 3 steps, but no checkpoint to go on from: .* overwrite"):
        resume_path(replace(config, train=replace(config.train, save_every=5)))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        build(config)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_final_model_is_not_overwritten_by_a_training_that_begins(tmp_path: Path) -> None:
    config = run_of(tmp_path, 1)
    (Path(config.train.output_dir) / "final").mkdir()
    write_record(Path(config.train.output_dir) / "final", 1, tmp_path)
    with pytest.raises(ValueError, match="a training of 1 steps with its final model, but no checkpoint"):
        resume_path(config)


@pytest.mark.parametrize("left", ["{}", "train: 3", "train: {save_every: often}", "]"])
def test_a_training_that_was_killed_before_its_first_checkpoint_begins_again(left: str, tmp_path: Path) -> None:
    """The line of the step that is to be saved is there before the checkpoint."""
    config = run_of(tmp_path, 2)
    assert resume_path(config) is None
    (Path(config.train.output_dir) / "config.yaml").write_text(left)
    assert resume_path(config) is None, "the options of today stand in for those of the run"


def test_a_training_whose_checkpoints_are_all_damaged_is_not_overwritten(tmp_path: Path) -> None:
    config = run_of(tmp_path, 1)
    for step in (1, 2):
        (saved(config, step) / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(ValueError, match=r"its checkpoints are damaged \(step_2, step_1\): .* overwrite"):
        resume_path(config)
