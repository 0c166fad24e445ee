"""Every command in README.md and docs/ works: run where that is quick, else read by the parser that would read it."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import PAGES, Command, commands, files
from launching import ROOT, launch

from grpo_dist.cli.examples import copy_examples
from grpo_dist.cli.main import main, make_parser
from grpo_dist.config import evaluation
from grpo_dist.config.names import option_types
from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config
from grpo_dist.config.values import flat

SHORT = ("--train.num_train_steps", "1", "--train.num_eval_prompts", "4")
NOT_HERE = {
    # by how a command begins: why it is not even parsed
    "scancel": "needs a cluster", "vllm": "needs a GPU", "pip install": "needs a network",
    "python tests/real/": "needs a network", "export": "changes the reader's shell",
}  # fmt: skip
ONLY_READ = {
    # verbs that are read by their parser alone
    "bench": "takes minutes", "watch": "serves until it is interrupted",
}  # fmt: skip
NEEDED = {"--push_to_hub"}
"""Options that need an account: read by their verb's parser alone."""
STAND_INS = {"FILE": "configs/quickstart.yaml", "RUN": "runs/quickstart", "COMPLETIONS": "completions.jsonl",
             "OTHER_OUTPUT": "other"}  # fmt: skip
"""What the test puts in the place of what a page leaves to its reader."""
SELDOM = {"python -m grpo_dist plan --config configs/gsm8k_lora.yaml", "python -m grpo_dist plan --config FILE",
          "python -m grpo_dist check --config own.yaml",
          "python -m grpo_dist check --config configs/gsm8k_lora.yaml"}  # fmt: skip
"""How commands begin that take long, and of which a test of their own runs the like."""
ALL = [command for page in PAGES for command in commands(page)]


def exceptions(command: Command) -> list[str]:
    """The starts among NOT_HERE with which a command begins."""
    return [start for start in NOT_HERE if command.text.startswith(start) or " ".join(command.words).startswith(start)]


def row(command: Command) -> Any:
    """A command as a row of the test."""
    marks = [pytest.mark.slow] if any(command.text.startswith(start) for start in SELDOM) else []
    return pytest.param(command, marks=marks, id=f"{command.page}: {command.text[:70]}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory: the shipped files, the pages' files, and runs of the quickstart and first task."""
    directory = tmp_path_factory.mktemp("reader")
    copy_examples(directory)
    shutil.copytree(ROOT / "docs", directory / "docs")
    for page in PAGES:
        for name, content in files(page).items():
            (directory / name).write_text(content)
    (directory / "completions.jsonl").write_text('{"completion": " 5"}\n')
    for evaluated in ("other", "runs/before"):
        (directory / evaluated).mkdir(parents=True)
        (directory / evaluated / "samples_0.jsonl").touch()
    subprocess.run([sys.executable, "make_data.py"], cwd=directory, check=True)
    for config in ("configs/quickstart.yaml", "my_task.yaml", "configs/calculator.yaml"):
        done = launch(None, 1, "--config", config, *SHORT, directory=directory)
        assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.parametrize("command", [row(command) for command in ALL if not exceptions(command)])
def test_every_command_of_the_docs_works(command: Command, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("builtins.input", lambda prompt="": "")
    require_working([STAND_INS.get(word, word) for word in command.words])


def test_no_command_is_left_out_for_a_reason_that_has_gone() -> None:
    """It would leave out, without a word, the next one that begins so."""
    assert {start for command in ALL for start in exceptions(command)} == set(NOT_HERE)
    assert {start for command in ALL for start in SELDOM if command.text.startswith(start)} == SELDOM


def require_working(words: list[str]) -> None:
    """Run a command, which has to succeed, or have its program's parser read it; raises where it would not work."""
    program = words[0].removeprefix("./")
    if program == "accelerate":
        given = launch_command_parser().parse_args(words[2:])
        assert words[1] == "launch" and Path(given.config_file).is_file()
        assert given.num_processes  # the config's own number fits few machines
        if given.module:
            module(given.training_script, given.training_script_args)
        else:
            assert Path(given.training_script).is_file()
    elif program in ("torchrun", "deepspeed"):
        place = words.index("grpo_dist.train")
        module(words[place], words[place + 1 :])
    elif program.startswith("launch/"):
        script(program, words[1:])
    elif program == "sbatch":
        place = words.index("launch/slurm.sbatch")
        script(words[place], words[place + 1 :])
    elif words[:2] == ["python", "-m"]:
        module(words[2], words[3:])
    elif program == "grpo-dist":
        module("grpo_dist", words[1:])
    elif program == "python":
        assert Path(words[1]).is_file()
    else:
        raise AssertionError(f"nobody knows how to check {words}")


def script(name: str, arguments: list[str]) -> None:
    """The launchers hand their arguments on; CI runs quickstart.sh and test.sh as they are."""
    assert (ROOT / name).is_file()
    if name in ("launch/test.sh", "launch/test_lowest.sh"):
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
    elif name not in ("launch/setup.sh", "launch/setup_vllm.sh", "launch/lint.sh"):
        module("grpo_dist.train", arguments)


def module(name: str, arguments: list[str]) -> None:
    """Read the options of a module's program, or run a verb."""
    if name == "grpo_dist.train" or (name == "grpo_dist" and arguments[0] == "train"):
        arguments = arguments[arguments[:1] == ["train"] :]
        parse(lambda: parse_config([word for word in arguments if word != "--dry_run"]))
    elif name == "grpo_dist.evaluate" or (name == "grpo_dist" and arguments[0] == "evaluate"):
        parse(lambda: evaluation.read_options(arguments[arguments[:1] == ["evaluate"] :]))
    elif name == "grpo_dist" and arguments[0] not in ONLY_READ and not NEEDED & set(arguments):
        assert main(arguments) == 0
    elif name == "grpo_dist":
        parse(lambda: make_parser(arguments[:1]).parse_known_args(arguments))
    else:
        assert importlib.util.find_spec(name), f"there is no module {name}"


def parse(read: Callable[[], object]) -> None:
    """Let a parser read; --help and --print_config end the program, with success."""
    try:
        read()
    except SystemExit as ended:
        assert ended.code in (0, None)


def test_the_readmes_first_commands_are_what_ci_runs() -> None:
    readme = [command.words[0] for command in ALL if command.page == "README.md"]
    assert readme[:2] == ["./launch/quickstart.sh", "./launch/test.sh"]
    assert all(f"{name}" in (ROOT / ".ci" / "run").read_text() for name in ("launch/quickstart.sh", "launch/test.sh"))


def test_no_page_is_without_commands_by_accident() -> None:
    assert len(ALL) > 30 and {"README.md", "first_task.md", "distributed.md"} <= {command.page for command in ALL}


def test_the_readmes_python(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        exec(compile(block, "README.md", "exec"), {})
    assert "12 - 7" in capsys.readouterr().out


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page.read_text())):
            place = page.parent / target if target else page
            assert target.startswith("http") or place.exists(), f"{page.name}: {target}"
            assert not anchor or target.startswith("http") or anchor in anchors(place), (
                f"{page.name}: {target}#{anchor}"
            )


def test_extras_named_are_there() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for page in PAGES:
        named = {name for group in re.findall(r"grpo_dist\[([\w,]+)\]", page.read_text()) for name in group.split(",")}
        assert named <= extras, page.name


def load_script(path: Path) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_options_page_is_current() -> None:
    page = load_script(ROOT / "docs" / "options.py").render()
    assert page == (ROOT / "docs" / "options.md").read_text(), "run: python docs/options.py"
    for key in option_types():
        assert f"`{key.rpartition('.')[2]}`" in page, key


def test_every_field_of_trl_has_an_answer() -> None:
    fields = set(json.loads((ROOT / "tests" / "fixtures" / "trl_grpo_fields.json").read_text())["fields"])
    page = (ROOT / "docs" / "from_trl.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert fields <= {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    ours = {name for row in rows for name in re.findall(r"`((?:[a-z]+)\.[\w.]+)`", row[1])}
    groups = {key.partition(".")[0] for key in option_types()}
    unknown = {name for name in ours if name.partition(".")[0] in groups} - set(option_types())
    assert len(ours) > 40 and not unknown


def test_defaults_beside_trls_are_the_defaults() -> None:
    page = (ROOT / "docs" / "from_trl.md").read_text()
    table = page.partition("## Defaults that differ")[2].partition("##")[0]
    named = dict(re.findall(r"`(\w+\.\w+): ([^`]+)`", table))
    defaults = flat(asdict(Config()))
    assert len(named) > 15
    assert named == {key: str(defaults[key]).lower().replace("'", "") for key in named}
