"""Checkpoints: complete or not there, bit for bit, and nothing in them is followed or executed."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.store import MANIFEST, META, TENSORS, DamagedCheckpoint

pytestmark = pytest.mark.quick


def state(seed: int) -> dict[str, Tensor]:
    """Tensors of several dtypes and shapes, with values that rounding would lose."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight/a": torch.randn(3, 5, generator=generator), "exp_avg/a": torch.randn(7, generator=generator).bfloat16(),
        "adam_steps": torch.tensor(seed), "odd": torch.tensor([torch.nan, -0.0, torch.inf, 1e-45]),
        "empty": torch.zeros(0, 4), "double": torch.randn(2, generator=generator, dtype=torch.float64),
    }  # fmt: skip


def save(root: Path, step: int, keep: int = 10) -> Path:
    """A checkpoint whose tensors depend on its step."""
    return checkpoint.save(root, step, state(step), {"identity": {"seed": step, "base": None}}, keep)


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_manifest(path: Path, names: list[str]) -> None:
    """A manifest that agrees with what the named files hold now."""
    files = {name: {"bytes": (path / name).stat().st_size,
                    "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()} for name in names}  # fmt: skip
    (path / MANIFEST).write_text(json.dumps({"files": files}))


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "not" / "yet", 12)
    assert path == tmp_path / "not" / "yet" / "step_12"
    tensors, meta = checkpoint.load(path)
    expected = state(12)
    assert meta == {"step": 12, "identity": {"seed": 12, "base": None}}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(tensors[name]) == bits(tensor)
    assert {file.name for file in path.iterdir()} == {TENSORS, META, MANIFEST}


def truncate(path: Path) -> None:
    """Lose the end of the tensors."""
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[:-7])


def flip(path: Path) -> None:
    """Change one bit in the middle of the tensors."""
    content = bytearray((path / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (path / TENSORS).write_bytes(content)


def no_manifest(path: Path) -> None:
    """Never committed."""
    (path / MANIFEST).unlink()


def half_manifest(path: Path) -> None:
    """The manifest's own end is lost."""
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])


def odd_manifest(path: Path) -> None:
    """JSON, but not a manifest."""
    (path / MANIFEST).write_text('["files"]')


def no_tensors(path: Path) -> None:
    """A file is gone."""
    (path / TENSORS).unlink()


def other_meta(path: Path) -> None:
    """The metadata was edited, its size kept."""
    (path / META).write_text((path / META).read_text().replace('"step": 2', '"step": 9'))


def empty_manifest(path: Path) -> None:
    """A manifest that vouches for nothing."""
    write_manifest(path, [])


def manifest_without_tensors(path: Path) -> None:
    """A manifest that does not vouch for what would be loaded."""
    write_manifest(path, [META])


DAMAGE = [truncate, flip, no_manifest, half_manifest, odd_manifest, no_tensors, other_meta, empty_manifest,
          manifest_without_tensors]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_checkpoint_before_it_taken(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == path
    damage(path)
    with pytest.raises(DamagedCheckpoint, match="step_2"):
        checkpoint.verify(path)
    with pytest.raises(DamagedCheckpoint, match="step_2"):
        checkpoint.load(path)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == tmp_path / "step_1"
    if damage is not no_manifest:  # what was never committed is nobody's loss
        assert "step_2" in caplog.text
    assert checkpoint.load(tmp_path / "step_1")[1]["step"] == 1


def test_a_damaged_only_checkpoint_is_none(tmp_path: Path) -> None:
    flip(save(tmp_path, 1))
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None
    with pytest.raises(DamagedCheckpoint):
        checkpoint.load(tmp_path / "nowhere")


def test_leftovers_are_ignored_and_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / "tmp_2"
    shutil.copytree(tmp_path / "step_1", leftover)  # killed between the manifest and the rename
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_7").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step_1"
    assert checkpoint.complete(tmp_path) == [tmp_path / "step_1"]
    assert checkpoint.newest(save(tmp_path, 2).parent) == tmp_path / "step_2"
    assert not leftover.exists()


def test_a_failed_save_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, keep=2)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 3, keep=2)
    assert checkpoint.complete(tmp_path) == [tmp_path / "step_2", tmp_path / "step_1"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):  # by number, not by name
        save(tmp_path, step, keep=2)
    assert checkpoint.complete(tmp_path) == [tmp_path / "step_100", tmp_path / "step_10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_100"]


def test_a_step_saved_again_replaces_the_old(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, {}, 10)
    tensors, _ = checkpoint.load(tmp_path / "step_5")
    assert list(tensors) == ["x"]


def test_a_kill_while_the_old_one_is_removed_leaves_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def killed(path: Path) -> None:
        (path / MANIFEST).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, {}, 10)
    assert checkpoint.newest(tmp_path) == tmp_path / "step_5" and list(checkpoint.load(tmp_path / "step_5")[0]) == ["x"]
    save(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_5", "step_6"]


@pytest.mark.parametrize("renames", range(3))
def test_a_kill_beside_a_rename_leaves_the_step(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many of the two renames by which a checkpoint replaces another of its step."""
    save(tmp_path, 4)
    save(tmp_path, 5)
    rename, done = Path.rename, 0

    def die_when_done() -> None:
        if done == renames:
            raise KeyboardInterrupt

    def rename_and_die(path: Path, target: Path) -> None:
        nonlocal done
        die_when_done()
        rename(path, target)
        done += 1
        die_when_done()

    with monkeypatch.context() as patches:
        patches.setattr(Path, "rename", rename_and_die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, {}, 10)
    newest, expected = checkpoint.newest(tmp_path), {*state(5)} if renames == 0 else {"x"}
    assert newest is not None and checkpoint.load(newest)[0].keys() == expected
    assert checkpoint.complete(tmp_path) == [newest, tmp_path / "step_4"]
    assert checkpoint.place_of(tmp_path / "step_5") == newest
    assert checkpoint.newest_id(tmp_path) == hashlib.sha256((newest / META).read_bytes()).hexdigest()
    save(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4", "step_5", "step_6"]
    assert checkpoint.load(tmp_path / "step_5")[0].keys() == expected


@pytest.mark.parametrize("lost", [None, "tmp_5"])
def test_a_save_that_was_cut_short_is_finished(lost: str | None, tmp_path: Path) -> None:
    """With the new checkpoint, and with the old one where the new one is not whole."""
    for step in (4, 5):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step_5", tmp_path / "tmp_5")
    (tmp_path / "tmp_5" / "new").touch()
    (tmp_path / "step_5").rename(tmp_path / "tmp_replaced_5")
    if lost:
        (tmp_path / lost / MANIFEST).unlink()
    for _ in range(2):
        checkpoint.finish_save(tmp_path)
        assert checkpoint.newest(tmp_path) == tmp_path / "step_5"
        assert (tmp_path / "step_5" / "new").exists() == (lost is None)


def test_what_was_just_saved_is_never_pruned(tmp_path: Path) -> None:
    """A run resumed by hand from an early checkpoint saves lower steps than those that lie there."""
    for step in (5, 10, 20):
        save(tmp_path, step)
    path = save(tmp_path, 6, keep=2)
    assert path.is_dir(), "the checkpoint that save() returned is gone"
    assert checkpoint.load(path)[1]["step"] == 6


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_a_manifest_that_points_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    (path / "sub").mkdir()
    (tmp_path / "checkpoints" / "secret").write_text("not yours")
    if not (path / name).is_file():
        pytest.skip(f"{name} is not there")
    write_manifest(path, [TENSORS, META, name])
    with pytest.raises(DamagedCheckpoint):
        checkpoint.verify(path)


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [TENSORS, META, "state.pkl", "pytorch_model.bin"])
def test_nothing_is_executed(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / name).write_bytes(pickle.dumps(Exploit(tmp_path / "executed")))
    write_manifest(path, sorted({TENSORS, META, name}))
    try:
        checkpoint.load(path)
    except Exception as error:  # what cannot be read must say so in the one way that callers know
        assert isinstance(error, DamagedCheckpoint), f"{type(error).__name__} instead of DamagedCheckpoint"
    assert not (tmp_path / "executed").exists()


def test_a_copy_under_another_name_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 3)
    newest = save(tmp_path, 4)
    shutil.copytree(tmp_path / "step_3", tmp_path / "step_9")
    assert checkpoint.newest(tmp_path) == newest
    assert "step_9 has the state after 3 steps" in caplog.text
