"""The package as users get it: what the archives hold, an installation elsewhere, other operating systems."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from launching import launch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
SHORT = ("--train.num_train_steps", "2", "--train.batch_size", "2", "--rollout.group_size", "2",
         "--train.num_eval_prompts", "2", "--logging.trackers", "[]")  # fmt: skip


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints that must succeed, without this checkout on its Python path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=240,
                          check=False, env=inherited | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a source distribution makes which a copy of the checkout made."""
    directory = tmp_path_factory.mktemp("build")
    for folder in ("grpo_dist", "configs", "accelerate_configs", "launch", "docs"):
        shutil.copytree(ROOT / folder, directory / "checkout" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, directory / "checkout")
    run(sys.executable, "-c", BUILD, "build_sdist", directory, cwd=directory / "checkout")
    with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    source = next((directory / "unpacked").iterdir())
    run(sys.executable, "-c", BUILD, "build_wheel", directory, cwd=source)
    return next(directory.glob("*.whl"))


def test_nothing_is_missing(wheel: Path) -> None:
    expected = {"launch/slurm.sbatch"}
    for folder in ("grpo_dist", "configs", "accelerate_configs", "docs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {str(path.relative_to(ROOT)) for path in files}
    expected = {name if name.startswith("grpo_dist/") else f"grpo_dist/{name}" for name in expected}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_installed_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """It trains there, without DeepSpeed as on macOS, and without bitsandbytes, which is imported for quantised bases
    alone: it takes a third of a start."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # the dependencies that are installed here already, rather than torch once more
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    place = run(python, "-c", "import grpo_dist; print(grpo_dist.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(purelib)

    told = " ".join(run(python, "-m", "grpo_dist.train", "--help", cwd=tmp_path, COLUMNS="999").split())
    assert (Path(told.partition("docs/… are in ")[2].partition(". ")[0]) / "vllm.md").is_file()

    project = tmp_path / "project"
    told = run(tmp_path / "venv" / "bin" / "grpo-dist", "examples", project, cwd=tmp_path)
    assert "quickstart.yaml" in told
    (tmp_path / "bitsandbytes.py").write_text("raise SystemExit('imported')")
    path = pretend(tmp_path, (), signals=False)
    run(python, "-m", "grpo_dist.train", "--preset", "dapo", "--config", "configs/quickstart.yaml", *SHORT, cwd=project,
        PYTHONPATH=path)  # fmt: skip
    assert (project / "runs" / "quickstart" / "final" / "model.safetensors").is_file()
    history = [json.loads(line) for line in (project / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [0, 1, 2]
    assert "clip_high: 0.28" in (project / "runs/quickstart/config.yaml").read_text()


OTHER_SYSTEM = """
import builtins, os, signal, sys

imported = builtins.__import__

def restricted(name, globals=None, *rest, **named):
    if name in {modules!r} and (globals or {{}}).get("__name__", "").startswith("grpo_dist"):
        raise ImportError(f"{{name}} is not on this system")
    return imported(name, globals, *rest, **named)

builtins.__import__ = restricted
sys.modules["deepspeed"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    {signals} and delattr(signal, name)
del os.sched_getaffinity
"""


OTHER_IMPORTS = """
import importlib, sys
for name in [each for each in sys.modules if each.partition(".")[0] in ("grpo_dist", "deepspeed")]:
    del sys.modules[name]
import sitecustomize
for name in {names}:
    importlib.import_module(name)
    print(name)
"""
"""Forks have imported the package already: it is imported again, as on the other system."""


def pretend(directory: Path, modules: tuple[str, ...], signals: bool) -> str:
    """A directory for PYTHONPATH that takes from Python what other systems lack, DeepSpeed among it."""
    (directory / "sitecustomize.py").write_text(OTHER_SYSTEM.format(modules=modules, signals=signals))
    return str(directory)


def test_every_module_imports_on_windows(tmp_path: Path) -> None:
    """But for what is a program of its own, of Linux or beside a peer, and what is for a GPU with Triton."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "grpo_dist").rglob("*.py")]
    programs = {"grpo_dist.__main__", "grpo_dist.rewards.sandbox_launcher",
                "grpo_dist.cli.bench.peer_trl", "grpo_dist.cli.bench.peer_vllm"}  # fmt: skip
    native = ("draw_kernels", "fused", "fused_draw", "gpu", "pages", "tables", "triton_kernels")
    of_update = (f"model.{name}_kernel" for name in ("gate", "head", "join", "rotation"))
    with_triton = [*of_update, *(f"rollout.native.{name}" for name in native)]
    on_gpu = {f"grpo_dist.{name}" for name in with_triton}
    names = sorted({name.removesuffix(".__init__") for name in modules} - programs - on_gpu)
    pretend(tmp_path, ("resource", "fcntl", "termios", "pty", "triton"), signals=True)
    (tmp_path / "program.py").write_text(OTHER_IMPORTS.format(names=names))
    done = launch(None, 1, program=[str(tmp_path / "program.py")], environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == names


def test_every_extra_is_bounded() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for requirement in "\n".join(lines).split("\n"):
        name, _, bounds = requirement.partition(">=")
        assert not name or "==" in name or ",<" in bounds, f"{requirement!r} has no tested lower and upper bound"


def pinned(file: str) -> dict[str, list[Version]]:
    """The releases that a file of constraints names for each package, oldest first."""
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).extend(
                Version(each.version) for each in requirement.specifier
            )
    return {name: sorted(releases) for name, releases in pins.items()}


def test_lower_bounds_are_what_is_tested() -> None:
    """launch/test_lowest.sh installs the oldest releases that setup.cfg allows, and the README names what is tested."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lowest, usual = pinned("constraints-lowest.txt"), pinned("constraints.txt")
    for requirement in map(Requirement, setup["options"]["install_requires"].split("\n")[1:]):
        name = canonicalize_name(requirement.name)
        (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
        assert lowest[name][0] == bound, f"of {name} setup.cfg allows {bound}"
        assert usual[name][-1] in requirement.specifier, name
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for name, oldest, newest in rows:
        assert (Version(oldest), Version(newest)) == (lowest[name][0], usual[name][-1]), name
