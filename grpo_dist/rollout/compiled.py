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
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-Wall"]


class CannotCompile(ValueError):
    """There is no compiler, or it failed."""


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The library of a file of C++ with OpenMP, compiled for this processor. Raises CannotCompile.

    The compiler is `$CXX`, or one of the usual names. Libraries are kept in `$XDG_CACHE_HOME/grpo_dist`
    (`~/.cache/grpo_dist`), under a name made of all that they depend on.
    """
    compiler = _compiler()
    # torch's own OpenMP: threads of a second one would fight with it for the cores
    openmp = _openmp()
    made_of = (source.read_bytes(), compiler, FLAGS, openmp, _output([*compiler, "--version"]), _processor())
    name = f"{source.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    directory, kept = _directory()
    try:
        if not (directory / name).is_file():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                whole, parts = Path(scratch) / name, Path(scratch) / "object.o"
                _output([*compiler, *FLAGS, "-fopenmp", "-c", str(source), "-o", str(parts)])
                _output([*compiler, "-shared", str(parts), openmp, "-o", str(whole)])
                whole.replace(directory / name)  # other ranks may be at the same
        return ctypes.CDLL(str(directory / name))
    except OSError as error:
        raise CannotCompile(str(error)) from error
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def _compiler() -> list[str]:
    if given := shlex.split(os.environ.get("CXX", "")):
        return given
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        raise CannotCompile("there is no C++ compiler: g++, c++ and clang++ are not on the PATH, and CXX is not set")
    return [found]


def _openmp() -> str:
    """The OpenMP library that torch has loaded."""
    import torch  # noqa: F401

    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        raise CannotCompile(f"OpenMP is looked for as Linux does, not on {platform.system()}") from None
    found = re.search(r"\S*/lib(gomp|iomp5|omp)[^/\s]*\.so\S*", loaded)
    if found is None:
        raise CannotCompile("torch has loaded no OpenMP")
    return found[0]


def _processor() -> str:
    """What the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _directory() -> tuple[Path, bool]:
    """Where libraries lie, and whether they are kept: nothing is loaded from a directory that is not the user's."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_dist"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory, True
    except (OSError, RuntimeError):  # no home
        pass
    return Path(tempfile.mkdtemp(prefix="grpo_dist-")), False


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise CannotCompile(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CannotCompile(f"{shlex.join(command)}: {error.stderr.strip()}") from error
