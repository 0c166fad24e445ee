"""Start real trainings: through `accelerate launch` or plain Python, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_vllm
import pyarrow.parquet as pq
import torch
from resident import ForkedRun, server_for
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.model.peft import with_saved_adapters
from grpo_dist.model.toy import toy_path

ROOT = Path(__file__).parents[2]
TINY = [
    "--config", "configs/quickstart.yaml", "--model.dtype", "float32", "--reference.dtype", "float32",
    "--train.num_train_steps", "3", "--train.batch_size", "7", "--rollout.group_size", "5",
    "--data.eval_file", "null", "--scoring.num_workers", "1",
]  # fmt: skip
"""Three steps of the toy model; 7 prompts and 5 completions divide by no number of ranks used here."""
EVALUATED = ("--data.eval_file", "configs/data/math_tasks_eval.jsonl", "--train.num_eval_prompts", "16",
             "--train.eval_every", "0")  # fmt: skip
"""The same with an evaluation before the first step and after the last one."""


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that nothing else gets while the tests run: it is bound here, which lets a launcher listen on it."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("", 0))
    _reserved.append(probe)
    return int(probe.getsockname()[1])


TRAINER = ["-m", "grpo_dist.train"]


def command(strategy: str | None, num_processes: int, program: list[str] = TRAINER) -> list[str]:
    """The command that starts the trainer under accelerate_configs/STRATEGY.yaml, or a path without its ending, or
    plainly for None."""
    if strategy is None:
        return [sys.executable, *program]
    file = Path("accelerate_configs", f"{strategy}.yaml")
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
        "--num_processes", str(num_processes), "--main_process_port", str(free_port()), *program,
    ]  # fmt: skip


def begin(
    strategy: str | None, num_processes: int, *arguments: str, environment: dict[str, str] | None = None,
    program: list[str] = TRAINER, directory: Path = ROOT, fresh: bool = False,
) -> subprocess.Popen[str] | ForkedRun:  # fmt: skip
    """Start a training, for tests that do something to it while it runs.

    Its processes are forks of one that has imported the libraries (see fork_server.py), or `fresh`, as a user's are.
    """
    words = [*command(strategy, num_processes, program), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    server = None if fresh else server_for(variables)
    if server is not None:
        return server.start(words[1:], directory, variables)
    return subprocess.Popen(
        words, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )


def launch(
    strategy: str | None, num_processes: int, *arguments: str, environment: dict[str, str] | None = None,
    timeout_seconds: float = 300, program: list[str] = TRAINER, directory: Path = ROOT, fresh: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a training to its end and return what it printed; `fresh` is that of `begin`."""
    run = begin(strategy, num_processes, *arguments, environment=environment, program=program, directory=directory,
                fresh=fresh)  # fmt: skip
    try:
        out, err = run.communicate(timeout=timeout_seconds)
    except BaseException:
        run.kill()
        run.wait()
        raise
    return subprocess.CompletedProcess(run.args, run.wait(), out, err)


def python_of_fake_vllm(directory: Path, fresh: bool = False) -> str:
    """The Python of an environment in which vLLM is the small server of fake_vllm.py.

    What it starts can be waited for and killed. The model is in this process, which has imported torch, or `fresh` in
    the one that is started.
    """
    python, server = directory / "python", ROOT / "tests" / "unit" / "fake_vllm.py"
    environment = f"PYTHONPATH={server.parent}:{ROOT}"
    python.write_text(
        f'#!/bin/sh\n{environment} exec {sys.executable} {server} "$@"\n' if fresh
        else fake_vllm.PROGRAM.format(python=sys.executable, port=fake_vllm.door())
    )  # fmt: skip
    python.chmod(0o755)
    return str(python)


def train(
    strategy: str | None, num_processes: int, directory: Path, *arguments: str, fresh: bool = False,
    timeout_seconds: float = 300,
) -> Path:  # fmt: skip
    """A training that must succeed; returns its output directory."""
    done = launch(strategy, num_processes, *TINY, "--train.output_dir", str(directory), *arguments, fresh=fresh,
                  timeout_seconds=timeout_seconds)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return directory


def without_its_last_step(run: Path, copy: Path) -> Path:
    """A copy of a run that ended, as it was before the last step: the same command goes on from the checkpoint then."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    newest = checkpoint.newest(copy / "checkpoints")
    assert newest is not None
    shutil.rmtree(newest)
    return copy


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def reported_steps(directory: Path) -> list[int]:
    """The steps in the curves of report.html."""
    page = (directory / "report.html").read_text()
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(data)["runs"][0]["curves"]["step"]


def printed(program: str, *arguments: str) -> Any:
    """What a program of tests/unit prints as JSON: the simulated device changes torch for a process."""
    done = launch(None, 1, *arguments, program=[f"tests/unit/{program}"], environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def completions(directory: Path) -> list[dict[str, Any]]:
    """Every completion of the run, in order."""
    return [
        row for file in sorted((directory / "completions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def adapters(directory: Path) -> dict[str, Tensor]:
    """The exported adapter."""
    return load_file(directory / "final" / "adapter" / "adapter_model.safetensors")


def merged_equals_adapter(directory: Path) -> bool:
    """Whether what a run of the toy model wrote, reopened, is the base with the adapter on it, and not the base."""
    merged = AutoModelForCausalLM.from_pretrained(directory / "final", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(toy_path(), dtype=torch.float32)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = with_saved_adapters(base, str(directory / "final" / "adapter"))(ids).logits
        equal = torch.allclose(merged(ids).logits, adapted, atol=1e-4)
    return equal and not torch.allclose(plain, adapted, atol=1e-2)


def check_same(one: Path, other: Path, most: float = 1e-4) -> None:
    """Fail unless two runs drew the same, and their adapters differ by no more than rounding."""
    assert [row["completion"] for row in completions(other)] == [row["completion"] for row in completions(one)]
    assert relative_difference(adapters(one), adapters(other)) <= most


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the first, all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).pow(2).sum()) for name in a)
    return (difference / sum(float(a[name].double().pow(2).sum()) for name in a)) ** 0.5
