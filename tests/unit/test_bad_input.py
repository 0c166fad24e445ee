"""What may be wrong with a config, an output directory, a checkpoint or a model is found before any weights are loaded,
and nothing that comes from them is executed."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.resume import NEEDED, changes, identity, require_same_start, resume_path
from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config
from grpo_dist.data.rows import load_rows, open_rows
from grpo_dist.model.toy import toy_path
from grpo_dist.rewards.registry import file_digests
from grpo_dist.trainer.build import UserError, build
from grpo_dist.trainer.models import engine_to_keep

ROOT = Path(__file__).parents[2]


class Payload:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def config_of(tmp_path: Path, *arguments: str) -> Config:
    """The quickstart's config with an output directory of its own."""
    return parse_config(["--config", str(ROOT / "configs/quickstart.yaml"), "--data.train_file",
                         str(ROOT / "configs/data/math_tasks_eval.jsonl"), "--data.eval_file", "null",
                         "--train.output_dir", str(tmp_path / "run"), *arguments])  # fmt: skip


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "{tmp}/file/run"])
def test_an_output_directory_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=re.escape(place.format(tmp=tmp_path).rsplit("/", 1)[0])):
        build(config_of(tmp_path, "--train.output_dir", place.format(tmp=tmp_path)))


@pytest.mark.parametrize("tag", [f"!!python/{kind}:os.system" for kind in ("object/apply", "object/new", "name")])
def test_tags_in_a_config_execute_nothing(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model:\n  name: {tag} ['touch {tmp_path}/executed']\n")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(path)])
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_code_of_a_model_is_not_executed_unasked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in toy_path().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        build(config_of(tmp_path, "--model.name", str(model)))
    assert not (tmp_path / "executed").exists()


def test_pickled_weights_of_a_model_execute_nothing(tmp_path: Path) -> None:
    from grpo_dist.model.load import load_causal_lm

    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((toy_path() / name).read_bytes())
    with (model / "pytorch_model.bin").open("wb") as file:
        torch.save({"lm_head.weight": Payload(tmp_path / "executed")}, file)
    config = config_of(tmp_path, "--model.name", str(model)).model
    with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
        load_causal_lm(config, torch.float32, None)
    assert not (tmp_path / "executed").exists()


def test_both_readers_see_the_same_lines(tmp_path: Path) -> None:
    """A line of white space that is not JSON's is a row that cannot be read, to both."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(["\ufeff", " \t\r", "\u00a0", "\u2003{}", "{}", "\x0c", ""]).encode())
    rows = load_rows(str(path), "train")
    reader = open_rows(str(path), "train")
    assert [reader[place] for place in range(len(reader))] == rows
    assert [(row.number, bool(row.problem)) for row in rows] == [(3, True), (4, False), (5, False)]


# --- going on --------------------------------------------------------------------------------------------------------


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
        (("--lora.r", "8"), "lora.r: 32 -> 8"),
        (("--lora", "null"), "lora"),
        (("--train.seed", "7"), "seed: 0 -> 7"),
        (("--train.batch_size", "31"), "batch_size: 32 -> 31"),
        (("--advantage.baseline", "critic"), "critic: False -> True"),
        (("--data.train_file", "{a.jsonl: 1, b.jsonl: 2}"), "order.weights: None -> [1.0, 2.0]"),
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


def test_another_data_set_or_base_model_is_another_run(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config
    from grpo_dist.types import Prompt

    config = config_of(tmp_path)
    model_config = load_model_config(config.model)
    path = saved(config, 1)
    with pytest.raises(ValueError, match=r"data: .* -> .*\n *num_prompts: 0 -> 1"):
        changes(path, config, identity(config, model_config, [Prompt(0, [1, 2], "", None, {})]))
    other = identity(config, model_config, []) | {"base_weights": "another model saved in its place"}
    with pytest.raises(ValueError, match=r"base_weights: .* -> 'another model"):
        changes(path, config, other)
    size = model_config.hidden_size
    model_config.hidden_size *= 2
    with pytest.raises(ValueError, match=rf"run:\n  base\.config\.hidden_size: {size} -> {2 * size}\nChoose"):
        changes(path, config, identity(config, model_config, []))
    starts = [{"identity": identity(config, rank, [])} for rank in (load_model_config(config.model), model_config)]
    with pytest.raises(ValueError, match=rf"nodes: identity\.base\.config\.hidden_size: {size} -> {2 * size}$"):
        require_same_start(starts)


def test_other_changes_are_listed(tmp_path: Path) -> None:
    from grpo_dist.model.config_files import load_model_config

    config = config_of(tmp_path)
    path = saved(config, 1)
    after = config_of(tmp_path, "--optim.learning_rate", "2e-4", "--train.num_train_steps", "99")
    told = "\n".join(changes(path, after, identity(after, load_model_config(after.model), [])))
    assert "optim.learning_rate: 0.001 -> 0.0002" in told and "train.num_train_steps: 60 -> 99" in told
    assert "the version differs from the checkpoint's" in told  # the checkpoint above names none


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


def test_another_version_of_a_reward_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_dist.model.config_files import load_model_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text("def right(completions, **columns): ...")
    config = config_of(tmp_path, "--rewards", "[{name: 'own_task:right'}]")
    now = identity(config, load_model_config(config.model), [])
    meta = blank_meta() | {"identity": now, "config": asdict(config), "reward_files": file_digests(config.rewards)}
    del meta["step"]
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"x": torch.zeros(4)}, meta, keep=9)
    assert not any("own_task" in line for line in changes(path, config, now))
    (tmp_path / "own_task.py").write_text("def right(completions, **columns): return 1")
    assert "changed since the checkpoint: the file of own_task:right" in changes(path, config, now)
