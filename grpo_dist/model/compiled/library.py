"""C++ of this project, compiled when it is first needed and kept for the next time."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

HEADERS = Path(__file__).parent
OUTPUTS, HIGH_BLOCK, SPAN, CACHE_LINE = 4, 64, 64, 64
"""Outputs of a tile of a product, and of a block of the adapters' second matrix; inputs of a block of compact weights;
and bytes of a line of the processor's caches: weights are put in this order here, and the C++ reads them in it."""
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-Wno-psabi", f"-I{HEADERS}", f"-DOUTPUTS={OUTPUTS}",
         f"-DHIGH_BLOCK={HIGH_BLOCK}", f"-DSPAN={SPAN}", f"-DCACHE_LINE={CACHE_LINE}"]  # fmt: skip


class CannotCompile(ValueError):
    """There is no compiler, or it failed."""


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The library of a file of C++ with OpenMP, compiled for this processor. Raises CannotCompile.

    The compiler is `$CXX`, or one of the usual names. Libraries are kept in `$XDG_CACHE_HOME/grpo_dist`
    (`~/.cache/grpo_dist`), under a name made of all that they depend on.
    """
    try:
        openmp = _openmp()
        compiler = _compiler(openmp)
        compile_ = [*compiler, *FLAGS, "-fopenmp"]
        # with the instructions that -march=native has come to mean here: a home may be shared by unlike machines
        meaning = _output([*compile_, "-dM", "-E", "-x", "c++", os.devnull])
        files = [each.read_bytes() for each in (source, *sorted(HEADERS.glob("*.h")))]
        ingredients = repr((files, compile_, openmp, meaning))
        name = f"{source.stem}-{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}.so"
        with _directory() as directory:
            place = directory / name
            if place.is_file():
                with suppress(OSError):  # damaged, as by a full disk: made anew
                    return ctypes.CDLL(str(place))
                place.unlink()
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                made, parts = Path(scratch) / name, Path(scratch) / "object.o"
                _output([*compile_, "-c", str(source), "-o", str(parts)])
                # torch's own OpenMP: threads of a second one would fight with its threads for the cores
                _output([*compiler, "-shared", str(parts), openmp, "-o", str(made)])
                _put(made, place)
            return ctypes.CDLL(str(place))
    except OSError as error:
        raise CannotCompile(str(error)) from error


def _compiler(openmp: str) -> list[str]:
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotCompile(f"CXX: {error}") from error
    # what clang compiles calls its own OpenMP
    names = ["g++", "c++"] if "gomp" in Path(openmp).name else ["g++", "c++", "clang++"]
    installed = next(filter(None, map(shutil.which, names)), None)
    if given:
        return given
    if installed is None:
        raise CannotCompile(f"there is no C++ compiler: {', '.join(names)} are not on the PATH, and CXX is not set")
    return [installed]


def _openmp() -> str:
    """The OpenMP library that torch has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise CannotCompile(f"OpenMP is looked for as Linux does, not on {platform.system()}") from None
    mapped = dict.fromkeys(fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6)
    loaded = [path for path in mapped if re.fullmatch(r"lib(gomp|iomp5|omp)\b.*\.so.*", Path(path).name)]
    if not loaded:
        raise CannotCompile("torch has loaded no OpenMP")
    beside = str(Path(torch.__file__).parent.parent)  # torch/lib, or torch.libs
    return next((path for path in loaded if path.startswith(beside)), loaded[0])


@contextmanager
def _directory() -> Iterator[Path]:
    """Where libraries are kept; one for this time only where others could put theirs in, or nothing can be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "grpo_dist"
    own = directory.is_absolute()  # without HOME and an account, ~ stays as it is
    try:
        if own:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.stat()
            own = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK)
    except OSError:
        own = False
    if own:
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="grpo_dist-") as scratch:
            yield Path(scratch)


def _put(made: Path, place: Path) -> None:
    """Put a file where another rank, perhaps of another node, may have put the same and be running it."""
    try:
        os.link(made, place)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        made.replace(place)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise CannotCompile(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CannotCompile(f"{shlex.join(command)}: {error.stderr.strip()}") from error
