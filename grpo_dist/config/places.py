"""Where a model is, a local directory or a repository of the hub, and where a run writes."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..text.files import near_paths

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
"""A variable of a shell."""


def model_place(name: str, option: str, *files: str) -> str:
    """Return the argument of `from_pretrained` for a name: a directory's absolute path, or the hub id itself.

    Raises ValueError, which names the `option`, for a path with none of `files`, by default those of a model.
    """
    path = Path(name).expanduser()
    full = Path(os.path.abspath(path))
    if path.is_dir():
        files = files or ("config.json", "adapter_config.json")
        if not any((path / file).is_file() for file in files):
            inside = sorted(str(each.parent) for each in path.glob(f"*/{files[0]}"))
            hint = f"; there is one in {', '.join(inside[:3])}" if inside else _export_hint(full)
            hint = f". {advice}" if (advice := gguf_advice(path)) else hint
            raise ValueError(f"{option}: {name!r} given, but there is no {files[0]} in {full}: expected a directory "
                             f"that a model was saved to{hint}")  # fmt: skip
        return str(full)
    if path.is_file():
        raise ValueError(f"{option}: {name!r} given, which is a file ({full}): "
                         f"{gguf_advice(path) or 'expected the directory that it is in'}")  # fmt: skip
    if not is_path(name):
        return name
    near = [each.name for each in full.parent.iterdir() if each.is_dir()] if full.parent.is_dir() else []
    close = difflib.get_close_matches(full.name, near, n=1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else _export_hint(full)
    raise ValueError(f"{option}: {name!r} given, but there is no directory {full}: expected one that a model was "
                     f"saved to, or a hub id{hint}")  # fmt: skip


def gguf_advice(path: Path) -> str:
    """What to give in place of a GGUF file, or of a directory with some; empty for others."""
    is_gguf = path.suffix == ".gguf" or any(path.glob("*.gguf"))
    return "GGUF files are for inference alone: expected the safetensors that they were made of" if is_gguf else ""


def _export_hint(path: Path) -> str:
    """The end of a message about a run that has not ended, or about what is in it."""
    run = next((each for each in (path, *path.parents[:2]) if (each / "metrics.jsonl").is_file()), None)
    if run is None:
        return ""
    return f"; `python -m grpo_dist export {shlex.quote(str(run))}` writes the model of this run's newest checkpoint"


def is_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id is one word, or two words with a slash between them."""
    words = name.split("/")
    return name.startswith((".", "/", "~")) or name.endswith("/") or len(words) > 2 or "\\" in name


def require_run(path: Path) -> None:
    """Raise ValueError where there is no such directory of a run, or checkpoint, with the names near it."""
    if not path.exists():
        raise ValueError(f"no directory {str(path)!r} in {Path.cwd()}{near_paths(str(path))}: expected that of a run, "
                         "its train.output_dir")  # fmt: skip


def require_metrics(directory: Path) -> None:
    """Raise ValueError where there is no directory of a run, or none that has written metrics."""
    require_run(directory)
    if not (directory / "metrics.jsonl").is_file():
        inside = sorted(directory.iterdir()) if directory.is_dir() else []
        near = [str(each) for each in (*inside, *directory.parents[:2]) if (each / "metrics.jsonl").is_file()]
        hint = f"; there is one in {', '.join(near[:3])}" if near else ""
        raise ValueError(f"{directory} is no run: expected metrics.jsonl in it, as in `train.output_dir`{hint}")


def existing_part(directory: Path) -> Path:
    """The directory, or its nearest parent that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


class UnwritableOutput(OSError):
    """A file of the run cannot be written; the message says where, why and what to do."""


@contextmanager
def writing_to(directory: Path, option: str = "train.output_dir") -> Iterator[None]:
    """Inside, files of an option's directory are written; raises UnwritableOutput where that fails, as on a full disk.

    Libraries in Rust (safetensors, tokenizers) have no class for such errors but a common end of their messages.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise UnwritableOutput(f"{option}: a file in {directory} cannot be written ({error}): make room there, or mend "
                               "what is wrong with it; the same command then goes on from what is complete"
                               ) from error  # fmt: skip


def require_writable(directory: Path, option: str = "train.output_dir") -> None:
    """Raise ValueError where nothing can be written to an option's directory, or where it does not exist, to its
    nearest parent that does, and where a link leads nowhere or the path has a shell's variable."""
    if variable := _VARIABLE.search(str(directory)):
        raise ValueError(f"{option}: {directory} given, but {variable[0]} stands for itself in a config: write "
                         "the path out, or give the option on the command line, where the shell replaces it"
                         )  # fmt: skip
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option}: {directory} given, a name that is not UTF-8 for Python, which takes names for "
                         f"{sys.getfilesystemencoding()}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1 in the environment, or "
                         "choose another") from None  # fmt: skip
    link = next((each for each in (directory, *directory.parents) if each.is_symlink() and not each.exists()), None)
    if link is not None:
        raise ValueError(f"{option}: {directory} given, but {link} is a link to {os.readlink(link)}, which "
                         "does not exist: make that directory, or choose another")  # fmt: skip
    existing = existing_part(directory)
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = f"{existing} cannot be written to ({error.strerror})"
        raise ValueError(f"{option}: {directory} given, but {reason}; choose a directory that can") from error
