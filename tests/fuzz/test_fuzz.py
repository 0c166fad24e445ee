"""Whatever is in a config, a data file, a completion or a checkpoint: it is taken, or refused as documented."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.resume import NEEDED
from grpo_dist.checkpoint.state import TrainState
from grpo_dist.config import mistakes, parse
from grpo_dist.config.names import option_types
from grpo_dist.config.parser import make_parser
from grpo_dist.config.schema import Config, DataConfig
from grpo_dist.config.values import flat
from grpo_dist.data.order import Sampler
from grpo_dist.data.prompts import PromptReader
from grpo_dist.data.rows import open_rows
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.rewards.math import MathRewardModel, last_integer, read_answer


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: every input is a file."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


# --- config ----------------------------------------------------------------------------------------------------------

OPTIONS = sorted(option_types())
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 1e-5, 1e400])
NASTY = st.sampled_from([
    "", "null", "~", "yes", "1e-5", "0x1F", "1_000", "12:30:00", "nan", "-.inf", "2026-01-01", "[", "{", "}{", "a: b",
    "- x", "&a [*a]", "*a", "!!python/object/apply:os.system [exit]", "!include x", "{a: 1, a: 2}", "? x", "%YAML 9",
    "{{x}}", "${x}", "../..", "--config", "toy", "math", "all-linear", "auto", "é\u202e", "[[[[", "'", '"', "#", "=",
    "|\n x", "\0",
])  # fmt: skip
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | NASTY
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8) | st.sampled_from(["name", "weight", "args", "schedule"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.tuples(st.sampled_from(OPTIONS), st.text(max_size=2)).map("".join)
NUMERIC = [name for name, kind in option_types().items() if kind in (int, float)]
GIVEN = st.one_of(
    st.tuples(st.sampled_from(NUMERIC), st.integers(1, 9) | st.floats(0, 1)),
    st.sampled_from([(name, value) for name, value in flat(asdict(Config())).items()]),
    st.tuples(st.sampled_from(OPTIONS), VALUES),
    st.tuples(NAMES, VALUES),
)
"""An option and what it is set to: plausible or not, of the wrong type, misspelt."""
WORDS = GIVEN.map(
    lambda given: [f"--{given[0]}", given[1] if isinstance(given[1], str) else json.dumps(given[1])]
) | st.lists(NASTY, min_size=1, max_size=2)


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested groups; the later one wins where two are at odds."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *groups, leaf = name.split(".")
        place = tree
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        place[leaf] = value
    return tree


FILES = (
    st.lists(GIVEN, min_size=1, max_size=2).map(lambda given: yaml.safe_dump(nested(dict(given))))
    | st.tuples(NASTY, st.text(max_size=30)).map("\n".join)
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)


@pytest.fixture(scope="module", autouse=True)
def parser() -> Iterator[None]:
    """Made once, and so are its defaults, which no input changes: both take longer than the parsing itself."""
    made = make_parser.__wrapped__()
    defaults = {skip: made.get_defaults(skip_validation=skip) for skip in (True, False)}
    made.get_defaults = lambda skip_validation=False, **_: defaults[skip_validation].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse, "make_parser", lambda: made)
        patch.setattr(mistakes, "make_parser", lambda: made)
        yield


@settings(max_examples=settings.default.max_examples // 2)  # each takes as long as several of the others
@given(file=st.none() | FILES, words=st.lists(WORDS, max_size=1))
def test_config(file: bytes | None, words: list[list[str]], folder: Path, outcomes: Counter[str]) -> None:
    """A Config, or status 2 with a message (0 where help or the config was asked for)."""
    arguments = [word for pair in words for word in pair]
    if file is not None:
        (folder / "config.yaml").write_bytes(file)
        arguments = ["--config", str(folder / "config.yaml"), *arguments]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            config = parse.parse_config(arguments)
        assert isinstance(config, Config)
        outcomes["taken"] += 1
    except SystemExit as end:
        assert end.code == 0 or (end.code == 2 and told.getvalue().startswith("error: "))
        assert "<class" not in told.getvalue() and "Parser key" not in told.getvalue(), told.getvalue()
        outcomes["refused"] += 1


# --- data ------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    SCALARS | st.sampled_from(["What is 1 + 1?", "7", "#### 3", "<|endoftext|>"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "content"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
COLUMNS = st.sampled_from(["prompt", "answer", "prompt", "answer", "prompts", "completions", "x"]) | st.text(max_size=4)
GOOD = st.fixed_dictionaries({"prompt": st.text(max_size=30), "answer": st.integers().map(str)}, optional={"x": JSON})
GOOD_LINES = GOOD.map(lambda row: json.dumps(row).encode())
LINES = GOOD_LINES | (
    st.dictionaries(COLUMNS, JSON, max_size=4).map(lambda row: json.dumps(row, ensure_ascii=False))
    | JSON.map(json.dumps)
    | st.text(max_size=30)
).map(lambda line: line.encode("utf-8", "surrogatepass")) | st.binary(max_size=30)  # fmt: skip
DATA = st.builds(
    lambda bad_rows, too_long, most, template: DataConfig(
        bad_rows=bad_rows, too_long=too_long, max_prompt_length=most, chat_template=template),
    st.sampled_from(["error", "drop"]), st.sampled_from(["bad_row", "drop", "truncate"]), st.integers(1, 40),
    st.sampled_from(["auto", "always", "never"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The toy model's, with a chat template that refuses what it does not know."""
    loaded = load_tokenizer(Config().model)
    loaded.chat_template = (
        "{% for message in messages %}{% if message.role not in ['user', 'system'] %}{{ raise_exception('who?') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    return loaded


@given(
    lines=st.lists(LINES, max_size=4) | st.lists(GOOD_LINES, min_size=1, max_size=3),
    end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]), config=DATA,
)  # fmt: skip
def test_data(
    lines: list[bytes], end: bytes, config: DataConfig, tokenizer: Any, folder: Path, outcomes: Counter[str]
) -> None:  # fmt: skip
    """Prompts within the limits, or a ValueError; reading row by row finds the same rows."""
    path = folder / "rows.jsonl"
    path.write_bytes(end.join(lines))
    try:
        prompts, report = PromptReader(config, tokenizer, [MathRewardModel.check_answer]).load(str(path), "train")
    except ValueError as error:
        assert str(path) in str(error) or "data." in str(error)
        outcomes["refused"] += 1
        return
    assert all(1 <= len(prompt.ids) <= config.max_prompt_length for prompt in prompts)
    assert len(open_rows(str(path), "train")) == report.num_rows
    outcomes["taken"] += 1


# --- the math reward -------------------------------------------------------------------------------------------------

DIGITS = st.text(alphabet="0123456789.,-\u2212+ #$xe()[]{}\n\t\u0661\u00b2\u202f", max_size=60)
MATHS = DIGITS | st.text(max_size=60) | NASTY
ANSWERS = MATHS | NUMBERS | st.none() | st.booleans() | st.lists(st.integers(), max_size=2) | st.binary(max_size=5)


@given(completion=MATHS, answer=ANSWERS)
def test_math_reward(completion: str, answer: object, outcomes: Counter[str]) -> None:
    """Right or wrong, or a ValueError for an answer that cannot be read; right only with the answer's own digits."""
    try:
        reward = MathRewardModel().compute_reward({"answer": answer}, completion)
    except ValueError:
        outcomes["refused"] += 1
        return
    assert reward in (0.0, 1.0)
    assert (reward == 1.0) == (last_integer(completion) == read_answer(answer))
    if reward:
        assert read_answer(answer).lstrip("-") in "".join(c for c in completion if c in "0123456789")
    outcomes["right" if reward else "wrong"] += 1


# --- checkpoints -----------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["flip", "cut", "insert", "zero"])
EDITS = st.lists(st.tuples(KINDS, st.floats(0, 1), st.integers(0, 255), st.integers(1, 64)), max_size=3)


def damaged(data: bytes, edits: list[tuple[str, float, int, int]]) -> bytes:
    """A file's bytes with bits flipped, and stretches cut out, put in or set to zero."""
    changed = bytearray(data)
    for kind, share, byte, length in edits:
        place = int(share * len(changed))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << byte % 8
        elif kind == "cut":
            del changed[place : place + length]
        elif kind == "insert":
            changed[place:place] = bytes([byte]) * length
        elif kind == "zero":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
    return bytes(changed)


def commit(root: Path, step: int) -> Path:
    """A small checkpoint."""
    tensors = {"weight/a": torch.arange(6.0).view(2, 3), "adam_steps": torch.tensor(step)}
    return checkpoint.save(root, step, tensors, META | {"step": step}, keep=9)


META = TrainState(0, 0.1, Sampler(1, 1, 0)).meta() | {"identity": {"seed": 0}, "config": {}, "versions": {}}


@given(
    edits=st.fixed_dictionaries({name: EDITS for name in (checkpoint.TENSORS, checkpoint.META, checkpoint.MANIFEST)}),
    forged=st.booleans(),
)
def test_checkpoint(
    edits: dict[str, list[tuple[str, float, int, int]]], forged: bool, folder: Path, outcomes: Counter[str]
) -> None:  # fmt: skip
    """The newest that is whole, bit for bit; a damaged one raises DamagedCheckpoint, also with checksums that fit."""
    root = folder / "checkpoints"
    if not root.exists():
        commit(root, 1)
    path = commit(root, 2)
    try:
        originals = {name: (path / name).read_bytes() for name in edits}
        for name, each in edits.items():
            if name != checkpoint.MANIFEST or not forged:
                (path / name).write_bytes(damaged(originals[name], each))
        if forged:
            (path / checkpoint.MANIFEST).write_text(json.dumps({"files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name in (checkpoint.TENSORS, checkpoint.META) for data in [(path / name).read_bytes()]
            }}))  # fmt: skip
        same = all((path / name).read_bytes() == originals[name] for name in (checkpoint.TENSORS, checkpoint.META))
        try:
            tensors, _ = checkpoint.load(path)
            checkpoint.load_meta(path, NEEDED)
        except checkpoint.DamagedCheckpoint:
            outcomes["refused"] += 1
        else:
            assert same or forged
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            outcomes["taken whole" if same else "taken, forged"] += 1
        assert checkpoint.newest(root) in (path, root / "step_1")
    finally:
        shutil.rmtree(path)
