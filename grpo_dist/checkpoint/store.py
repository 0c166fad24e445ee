"""Checkpoints that are complete or not there.

A checkpoint is written to a temporary directory, every file is flushed to the disk, a manifest with sizes and checksums
comes last, and one rename makes it visible. One of the same step is renamed before that, and removed after it. Older
ones are pruned only afterwards. A directory without a valid manifest is no checkpoint. Tensors are safetensors and the
rest is JSON: loading a checkpoint executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..text.files import sync

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
META = "state.json"
_READ_BYTES = 1 << 20
CHANGED = "it was changed, or another version wrote it; choose another train.output_dir, or remove it"
"""The end of the message about a complete checkpoint with the wrong contents."""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint's directory is incomplete or was changed."""


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def save(root: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Commit the state after `step` steps to `root/step_N` and prune all but the newest `keep` checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    finish_save(root)
    temporary, target, replaced = root / f"tmp_{step}", root / f"step_{step}", root / f"tmp_replaced_{step}"
    try:
        _write(temporary, {"step": step, **meta}, tensors)
    except BaseException:  # on a full disk, the rest of it would leave no room for anything else
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():  # of a run that was stopped before its next step, or was resumed from an earlier one
        target.rename(replaced)  # it is removed later: a kill meanwhile would leave none of this step
    temporary.rename(target)
    sync(root)
    if replaced.exists():
        shutil.rmtree(replaced)
    _prune(root, step, keep)
    return target


def finish_save(root: Path) -> None:
    """Name the checkpoint by its step whose save was killed between its two renames, and remove what a killed save has
    left beside it."""
    for path in complete(root):
        if path.name.startswith("tmp_"):
            path.rename(root / f"step_{_step(path)}")
    for leftover in root.glob("tmp_*"):
        shutil.rmtree(leftover)


def _write(directory: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint's files and flush them to the disk, the manifest last."""
    directory.mkdir()
    save_file(tensors, directory / TENSORS)
    (directory / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    files = {}
    for path in (directory / TENSORS, directory / META):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _checksum(path)}
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(directory / MANIFEST)
    sync(directory)


def _prune(root: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`; damaged ones do not count, later ones are of another branch."""
    kept = 0
    for path in complete(root):
        if _step(path) > step or kept == keep:
            log.info("removing %s", path)
            shutil.rmtree(path)
        elif _sizes_match(path):
            kept += 1


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _manifest(path: Path) -> dict[str, Any]:
    """Files by name, each with `bytes` and `sha256`. Raises DamagedCheckpoint."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        if set(files) != {TENSORS, META}:  # no other file is read, whatever a manifest says
            raise ValueError(f"its manifest names {sorted(files)}")
        return {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is not a complete checkpoint ({error})") from error


def _sizes_match(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in _manifest(path).items())
    except (OSError, DamagedCheckpoint):
        return False


def verify(path: Path) -> None:
    """Raise DamagedCheckpoint unless every file is as the manifest says."""
    for name, entry in _manifest(path).items():
        try:
            is_intact = (path / name).stat().st_size == entry["bytes"] and _checksum(path / name) == entry["sha256"]
        except OSError as error:
            raise DamagedCheckpoint(f"{path} is not a complete checkpoint ({error})") from error
        if not is_intact:
            raise DamagedCheckpoint(f"{path / name} does not match its manifest: the file is damaged")


def complete(root: Path) -> list[Path]:
    """Checkpoints under `root` that have a manifest, newest first. Raises OSError where it cannot be listed, which
    `glob` would take for empty: a run would begin anew.

    Where a save that replaces one of its step was killed between its two renames, the new one counts, under the name
    that it was written under; `finish_save` gives it its own.
    """
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    pieces = (name.rpartition("_") for name in names)
    steps = {step for prefix, _, step in pieces if prefix in ("step", "tmp_replaced") and step.isdecimal()}
    checkpoints = []
    for step in steps:
        places = [f"step_{step}"] if f"step_{step}" in names else [f"tmp_{step}", f"tmp_replaced_{step}"]
        checkpoints += [root / place for place in places if (root / place / MANIFEST).is_file()][:1]
    return sorted(checkpoints, key=_step, reverse=True)


def place_of(path: Path) -> Path:
    """Where the checkpoint lies that a path such as RUN/checkpoints/step_N names; the path itself where none does."""
    return next((each for each in complete(path.parent) if f"step_{_step(each)}" == path.name), path)


def newest_id(root: Path) -> str | None:
    """What identifies the newest checkpoint under `root` that has a readable manifest; None where there is none."""
    for path in complete(root):
        with suppress(DamagedCheckpoint):
            return str(_manifest(path)[META]["sha256"])
    return None


def newest(root: Path) -> Path | None:
    """The newest undamaged checkpoint under `root`; the log names those that it passes over."""
    checkpoints = complete(root)
    for path in sorted({*root.glob("step_*"), *root.glob("tmp_*")} - {*checkpoints}):
        log.warning("%s was not completed, or was replaced: it is no checkpoint, and is passed over", path)
    for path in checkpoints:
        try:
            verify(path)
            step = load_meta(path, {"step": int})["step"]
            if step != _step(path):
                raise DamagedCheckpoint(f"{path} has the state after {step} steps: it is a copy under another name")
            return path
        except DamagedCheckpoint as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def load_meta(path: Path, needed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata of a verified checkpoint. Raises DamagedCheckpoint where it lacks a `needed` name of that type."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / META} cannot be read ({error})") from error
    missing = [name for name, kind in (needed or {}).items()
               if not isinstance(meta, dict) or not isinstance(meta.get(name), kind)]  # fmt: skip
    if missing:
        raise DamagedCheckpoint(f"{path / META} lacks {', '.join(missing)}: {CHANGED}")
    return meta


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint. Raises DamagedCheckpoint."""
    verify(path)
    try:
        return load_file(path / TENSORS), load_meta(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from error
