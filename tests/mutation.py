"""Changes of a module, one at a time, and whether a test of the module sees them. `mutate.py` is the command.

The tests are collected once. For each change a fork of that process gets the changed code in place of the module's
functions, and runs the tests that call the changed function: those first that saw the last changes, then the quickest.
What a module does while it is imported cannot be changed so; `survives` imports it again, and asks all of its tests.
"""

from __future__ import annotations

import ast
import copy
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import pytest

PYTEST = ["-qx", "--assert=plain", "--hypothesis-seed=0",
          *(f"-pno:{name}" for name in ("anyio", "cacheprovider", "unraisableexception", "warnings"))]  # fmt: skip
"""Only whether a test fails is asked."""
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.RShift: ast.LShift,
    ast.LShift: ast.RShift, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    line: int
    change: str
    """`before -> after`."""
    source: str
    function: str | None
    """Name of the innermost function that has the change in its body; None for what is run by an import."""


def plain(source: str) -> str:
    """The module as mutants write it, so that lines are the same."""
    return ast.unparse(ast.parse(source))


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node that can be changed, with what it becomes."""
    annotations = {id(part) for node in ast.walk(tree) for name in ("annotation", "returns")
                   if (note := getattr(node, name, None)) for part in ast.walk(note)}  # fmt: skip
    messages = {id(part) for node in ast.walk(tree) if isinstance(node, (ast.Raise, ast.Assert))
                for part in ast.walk(node)}  # fmt: skip
    asserted = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"}
    asserted |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "frozen"}
    for node in ast.walk(tree):
        if id(node) in annotations | messages | asserted:
            continue
        new = copy.deepcopy(node)
        if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
            new.op = SWAPS[type(node.op)]()  # type: ignore[attr-defined]
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            new.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[attr-defined]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            new = node.operand
        elif isinstance(node, ast.IfExp):
            new.body, new.orelse = new.orelse, new.body  # type: ignore[attr-defined]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            new.value = not node.value  # type: ignore[attr-defined]
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            new.value = node.value + 1  # type: ignore[attr-defined]
        elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            new = ast.Return(ast.Constant(None))
        else:
            continue
        yield node, new


def mutants(source: str) -> Iterator[Mutant]:
    """The module with each of its changes."""
    tree = ast.parse(source)
    # outer functions come first, so that the innermost one stays
    inside = {id(part): node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)
              for statement in node.body for part in ast.walk(statement)}  # fmt: skip
    for node, new in changes(tree):
        kept = dict(vars(node)), node.__class__
        before = ast.unparse(node)
        node.__class__ = new.__class__  # type: ignore[assignment]
        vars(node).update(vars(new))
        text, after = ast.unparse(ast.fix_missing_locations(tree)), ast.unparse(node)
        node.__class__ = kept[1]  # type: ignore[assignment]
        vars(node).clear()
        vars(node).update(kept[0])
        yield Mutant(kept[0]["lineno"], f"{before} -> {after}", text, inside.get(id(node)))


def survives(copy_of: Path, module: Path, text: str, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass with this text in the module's place, in a process that has imported the libraries."""
    original = module.read_text()
    module.write_text(text)
    child = os.fork()
    if child == 0:
        _enter(copy_of)
        signal.alarm(int(seconds))  # a loop without an end is seen by whoever waits
        os._exit(pytest.main([*PYTEST, *tests]))
    _, status = os.waitpid(child, 0)
    module.write_text(original)
    return status == 0


def survivors(
    copy_of: Path, module: Path, tried: list[Mutant], tests: list[str], seconds: float, tell: Callable[[str], None]
) -> list[Mutant]:
    """The changes that no test sees, each of which is told as it is found. Raises RuntimeError where the tests fail
    without any."""
    left = copy_of / "survivors.json"
    left.unlink(missing_ok=True)
    module.write_text(plain(module.read_text()))
    child = os.fork()
    if child == 0:
        _enter(copy_of)
        loop = _Loop(module, tried, left, seconds, tell)
        os._exit(pytest.main([*PYTEST, *tests], plugins=[loop]))
    os.waitpid(child, 0)
    if not left.exists():
        raise RuntimeError("its tests fail without any change")
    again = [tried[number] for number in json.loads(left.read_text())]
    survived = []
    for mutant in again:
        if survives(copy_of, module, mutant.source, tests, seconds):
            survived.append(mutant)
        else:
            tell(f"{mutant.line}: {mutant.change}: a test sees it where the module is imported with it")
    return survived


def _enter(copy_of: Path) -> None:
    """Read the copy's files in this process, and print nothing."""
    os.chdir(copy_of)
    sys.path.insert(0, str(copy_of))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Loop:
    """A plugin of pytest that runs the collected tests once for each change, and writes the numbers of survivors."""

    def __init__(
        self, module: Path, tried: list[Mutant], left: Path, seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.module, self.tried, self.left, self.seconds, self.tell = str(module), tried, left, seconds, tell
        self.notes = left.with_name("notes.json")
        self.tracing = False
        self.cpu_seconds: int | None = None
        self.called: dict[str, list[str]] = {}
        self.took: dict[str, float] = {}
        self.failed: str | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """True in the process that has tried all changes; None has pytest run the tests, as a fork does."""
        functions = [each for each in gc.get_objects()
                     if isinstance(each, FunctionType) and each.__code__.co_filename == self.module]  # fmt: skip
        items = list(session.items)
        self.tracing = True
        if (status := self._fork()) is None:
            return None
        if status:
            return True
        self.tracing = False
        notes = json.loads(self.notes.read_text())
        called, order = notes["called"], sorted(items, key=lambda item: notes["took"][item.nodeid])
        left = []
        for number, mutant in enumerate(self.tried):
            asked = [item for item in order if mutant.function in called[item.nodeid]] or order
            if (status := self._fork()) is None:
                if not _replace(functions, compile(mutant.source, self.module, "exec"), mutant.function):
                    os._exit(0)
                session.items[:] = asked
                return None
            if status == 0:
                left.append(number)
                self.tell(f"{mutant.line}: {mutant.change}")
            elif killers := [item for item in order if item.nodeid == json.loads(self.notes.read_text())["failed"]]:
                order.remove(killers[0])
                order.insert(0, killers[0])
        self.left.write_text(json.dumps(left))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note which functions of the module a test calls, and how long it takes."""
        names: set[str] = set()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code.co_filename == self.module:
                names.add(frame.f_code.co_name)

        if self.tracing:
            threading.settrace(note)
            sys.settrace(note)
        start = time.perf_counter()
        result = yield
        if self.tracing:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        self.called[item.nodeid], self.took[item.nodeid] = sorted(names), time.perf_counter() - start
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which test failed."""
        if report.failed:
            self.failed = report.nodeid

    def pytest_sessionfinish(self) -> None:
        """Leave the notes of a fork to the process that waits for it."""
        self.notes.write_text(json.dumps({"called": self.called, "took": self.took, "failed": self.failed}))

    def _fork(self) -> int | None:
        """None in the fork; else its exit status, once it has ended."""
        self.notes.write_text(json.dumps({"failed": None}))
        child = os.fork()
        if child == 0:
            signal.alarm(int(self.seconds))
            if self.cpu_seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (self.cpu_seconds, self.cpu_seconds))
            return None
        _, status, used = os.wait4(child, 0)
        if self.cpu_seconds is None:  # of all tests, without a change: a loop without an end takes more
            self.cpu_seconds = int(10 + 3 * used.ru_utime)
        return status


def _replace(functions: list[FunctionType], changed: CodeType, name: str | None) -> bool:
    """Give functions the changed code; False where that cannot be done while the module stays imported."""
    codes: dict[tuple[str, int], list[CodeType]] = {}
    found = [changed]
    while found:
        code = found.pop()
        codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        found += [const for const in code.co_consts if isinstance(const, CodeType)]
    if name is None:
        return False
    for function in functions:
        same = codes[function.__code__.co_name, function.__code__.co_firstlineno]
        if len(same) > 1 or len(same[0].co_freevars) != len(function.__code__.co_freevars):
            return False
        function.__code__ = same[0]
    return True
