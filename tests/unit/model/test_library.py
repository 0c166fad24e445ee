"""How C++ is compiled and kept, and what is said where it cannot be."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from grpo_dist.model import pack_kernels
from grpo_dist.model.compiled import library as compiling
from grpo_dist.model.compiled.library import CannotCompile, library
from grpo_dist.rollout.native import kernel


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty directory for compiled libraries, and a small source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    yield source
    library.cache_clear()


def test_it_is_compiled_once(fresh: Path) -> None:
    assert library(fresh).answer() == 42
    (kept,) = (fresh.parent / "cache" / "grpo_dist").iterdir()
    made = kept.stat().st_mtime_ns
    library.cache_clear()
    assert library(fresh).answer() == 42
    assert kept.stat().st_mtime_ns == made
    fresh.write_text('extern "C" int answer() { return 43; }')
    library.cache_clear()
    assert library(fresh).answer() == 43
    assert len(list(kept.parent.iterdir())) == 2


def test_it_is_compiled_anew_for_other_headers(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "HEADERS", fresh.parent)
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, f"-I{fresh.parent}"])
    fresh.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }')
    for answer in (42, 43):
        (fresh.parent / "answer.h").write_text(f"#define ANSWER {answer}\n")
        library.cache_clear()
        assert library(fresh).answer() == answer


def test_without_a_place_to_keep_it(fresh: Path) -> None:
    (fresh.parent / "cache").write_text("a file")
    assert library(fresh).answer() == 42


def test_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have neither HOME nor an account: nothing is kept in a directory that is called ~."""

    def no_account(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", no_account)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(fresh.parent)
    assert library(fresh).answer() == 42
    assert list(fresh.parent.iterdir()) == [fresh]


def test_a_damaged_library_is_made_anew(fresh: Path) -> None:
    # by another process: this one would go on with the library that it has opened
    other = multiprocessing.get_context("fork").Process(target=library, args=(fresh,))
    other.start()
    other.join()
    assert other.exitcode == 0
    (kept,) = (fresh.parent / "cache" / "grpo_dist").iterdir()
    kept.write_bytes(b"")
    assert library(fresh).answer() == 42
    assert kept.stat().st_size > 0


def test_nothing_is_loaded_from_where_others_can_write(fresh: Path) -> None:
    directory = fresh.parent / "cache" / "grpo_dist"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    assert library(fresh).answer() == 42
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("/no/compiler", "/no/compiler: No such"), ("false", "^false -O3 "), ("g++ 'x", "CXX: No closing quotation"),
     ("", r"there is no C\+\+ compiler")],
)  # fmt: skip
def test_without_a_compiler(compiler: str, message: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(fresh.parent))
    with pytest.raises(CannotCompile, match=message):
        library(fresh)


def test_what_does_not_compile_is_shown(fresh: Path) -> None:
    fresh.write_text("no C++")
    with pytest.raises(CannotCompile, match=r"error: .*no"):
        library(fresh)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("source", [kernel.SOURCE, pack_kernels.SOURCE], ids=lambda source: source.name)
def test_sources_compile_without_a_warning(source: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, "-O1", "-Wall", "-Wextra", "-Werror"])
    assert library(source)
