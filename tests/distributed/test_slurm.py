"""launch/slurm.sbatch: what it refuses, and a training over two nodes of a real SLURM cluster where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import python_of_fake_vllm

ROOT = Path(__file__).resolve().parents[2]
SBATCH_FILE = ROOT / "launch" / "slurm.sbatch"
SERVING = ROOT / "launch" / "slurm_vllm.sbatch"
OURS = ("CONFIG", "ACCELERATE_CONFIG", "PROCS_PER_NODE", "GRPO_DIST_ROOT", "GRPO_DIST_VENV", "OMP_NUM_THREADS")
STEPS, PROMPTS, GROUP_SIZE = 3, 4, 8
LIMIT_SECONDS = 900

RECORDER = '''
"""A reward that notes on which node completions were scored: every rank scores those it generated."""
import os, pathlib, socket

def record(completions, directory, **_):
    with open(pathlib.Path(directory) / f"{socket.gethostname()}.{os.getpid()}", "a") as file:
        file.write(f"{len(completions)}\\n")
    return [0.0] * len(completions)
'''


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would steer the batch file, and with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in OURS} | changes


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (SBATCH_FILE, {"SLURM_JOB_ID": ""}, "sbatch launch/slurm.sbatch"),
        (SBATCH_FILE, {"SLURM_SUBMIT_DIR": "/"}, "/ is not the checkout"),
        (SBATCH_FILE, {"GRPO_DIST_VENV": "/nowhere"}, "run launch/setup.sh first"),
        (SBATCH_FILE, {"CONFIG": "no.yaml"}, "CONFIG=no.yaml is not a file"),
        (SBATCH_FILE, {"ACCELERATE_CONFIG": "zero9"}, "ACCELERATE_CONFIG=zero9"),
        (SERVING, {"SLURM_JOB_ID": ""}, "sbatch launch/slurm_vllm.sbatch"),
        (SERVING, {"GRPO_DIST_VENV": "/nowhere"}, "run launch/setup.sh first"),
        (SERVING, {"VLLM_PYTHON": "/nowhere"}, "run launch/setup_vllm.sh"),
    ],
)
def test_what_is_missing_is_said_at_once(script: Path, variables: dict[str, str], expected: str) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "GRPO_DIST_VENV": sys.prefix}
    result = subprocess.run(
        ["bash", script], env=environment(**(job | variables)), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert expected in result.stderr


def test_a_mistake_in_an_option_ends_the_job_before_any_launcher_starts() -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "GRPO_DIST_VENV": sys.prefix}
    result = subprocess.run(["bash", SBATCH_FILE, "--rollout.grup_size", "2"], env=environment(**job),
                            capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert result.returncode == 2
    assert "did you mean 'rollout.group_size'?" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def cluster() -> None:
    """Skip without a SLURM cluster that has two nodes to give."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        pytest.skip("no SLURM here (sbatch and sinfo are not on PATH)")
    try:
        nodes = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle,mixed,allocated", "--format=%N"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("SLURM's controller does not answer")
    if nodes.returncode:
        pytest.skip(f"no usable SLURM cluster: {nodes.stderr.strip()}")
    if len(set(nodes.stdout.split())) < 2:
        pytest.skip("the SLURM cluster has fewer than two usable nodes")


@pytest.fixture
def submitted() -> Iterator[list[str]]:
    """Ids of submitted jobs, cancelled at the end whatever happened."""
    jobs: list[str] = []
    yield jobs
    for job in jobs:
        subprocess.run(["scancel", "--quiet", job], check=False)


def job_field(job: str, name: str) -> str:
    """What SLURM knows of a job under one of its names, such as NodeList."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True)
    return dict(field.partition("=")[::2] for field in shown.stdout.split())[name]


def job_state(job: str) -> str:
    """The job's state as SLURM names it, such as COMPLETED."""
    return job_field(job, "JobState")


def wait_for(job: str) -> str:
    """Wait until the job has ended or LIMIT_SECONDS are over; return its state then."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while (state := job_state(job)) in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}:
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return state


def submit(
    overrides: dict[str, str], log: Path, submitted: list[str], script: Path = SBATCH_FILE, **changes: str
) -> str:
    """Submit a training on two nodes, one rank each; returns the job's id."""
    command = ["sbatch", "--parsable", "--nodes=2", "--time=15", f"--output={log}", str(script)]
    submission = subprocess.run(
        [*command, *(word for name, value in overrides.items() for word in (f"--{name}", value))],
        env=environment(GRPO_DIST_VENV=sys.prefix, PROCS_PER_NODE="1", **changes), cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert submission.returncode == 0, submission.stderr
    job = submission.stdout.strip().partition(";")[0]
    submitted.append(job)
    return job


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
@pytest.mark.parametrize("is_vllm", [False, True], ids=["fake", "vllm"])
def test_one_node_serves_and_the_other_trains(tmp_path: Path, submitted: list[str], is_vllm: bool) -> None:
    if is_vllm and "GRPO_DIST_VLLM" not in os.environ:
        pytest.skip("GRPO_DIST_VLLM does not name the Python of vLLM")
    python = os.environ["GRPO_DIST_VLLM"] if is_vllm else python_of_fake_vllm(tmp_path, fresh=True)
    log, run = tmp_path / "job.log", tmp_path / "run"
    words = {"train.output_dir": str(run), "train.num_train_steps": "2", "train.batch_size": "4",
             "rollout.group_size": "4", "data.eval_file": "null"}  # fmt: skip
    job = submit(words, log, submitted, script=SERVING, VLLM_PYTHON=python, VLLM_CPU_KVCACHE_SPACE="1")
    state = wait_for(job)
    for left in ROOT.glob(f"grpo_dist-vllm-{job}-*.log"):
        left.unlink()
    assert state == "COMPLETED", log.read_text()[-4000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[-1]["rollout/probe_gap"] <= 1e-4


@pytest.mark.usefixtures("cluster")
def test_two_nodes_train_together(tmp_path: Path, submitted: list[str]) -> None:
    scored = tmp_path / "scored"
    scored.mkdir()
    (tmp_path / "recorder.py").write_text(RECORDER)
    rewards = [{"name": "math"}, {"name": "recorder:record", "args": {"directory": str(scored)}}]
    overrides = {
        "train.output_dir": str(tmp_path / "run"),
        "train.num_train_steps": str(STEPS),
        "train.batch_size": str(PROMPTS),
        "rollout.group_size": str(GROUP_SIZE),
        "data.eval_file": "null",  # evaluation would be scored, and counted, too
        "rewards": json.dumps(rewards),
    }
    log = tmp_path / "job.log"
    job = submit(overrides, log, submitted, PYTHONPATH=str(tmp_path))

    assert wait_for(job) == "COMPLETED", log.read_text() if log.exists() else "the job wrote no log"

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3]
    by_node: Counter[str] = Counter()
    for file in scored.iterdir():
        by_node[file.name.rpartition(".")[0]] += sum(map(int, file.read_text().split()))
    # each node did its half: had they run side by side, each would have done everything
    assert sorted(by_node.values()) == [STEPS * PROMPTS * GROUP_SIZE // 2] * 2


@contextlib.contextmanager
def unplugged(node: str) -> Iterator[None]:
    """A node's network interface is down inside; the node has to be a network namespace of this machine."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    namespace = next((line.split()[0] for line in listed.splitlines() if line.split()[0].endswith(f"-{node}")), None)
    if namespace is None:
        pytest.skip(f"node {node} is no network namespace of this machine, whose cable could be pulled")
    subprocess.run(["ip", "-n", namespace, "link", "set", "eth0", "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "-n", namespace, "link", "set", "eth0", "up"], check=True)


def wait_until_pending(job: str, log: Path) -> None:
    """Wait until the job is put back into the queue."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while job_state(job) != "PENDING":
        assert time.monotonic() < deadline and job_state(job) != "FAILED", log.read_text()[-3000:]
        time.sleep(0.1)


INTERRUPTIONS = ("asked to make room", "requeued", "cancelled and submitted again", "a node unplugged")
"""Ways in which jobs end on a cluster."""


def interrupt(how: str, job: str, log: Path) -> None:
    """Interrupt a running job, and see it back in the queue or ended."""
    nodes = job_field(job, "NodeList")
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    if how == "cancelled and submitted again":
        subprocess.run(["scancel", job], check=True)
        assert wait_for(job) == "CANCELLED"
    elif how in ("asked to make room", "requeued"):
        command = ["scontrol", "requeue"] if how == "requeued" else ["scancel", "--signal=USR1", "--batch"]
        subprocess.run([*command, job], check=True)
        wait_until_pending(job, log)
    else:
        with unplugged(names.stdout.split()[-1]):  # not the one that runs the batch script
            wait_until_pending(job, log)


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_interrupted_it_ends_with_the_same_weights(how: str, tmp_path: Path, submitted: list[str]) -> None:
    overrides = {"train.num_train_steps": "40", "train.batch_size": "4", "train.save_every": "3",
                 "train.hang_timeout_seconds": "10", "data.eval_file": "null"}  # fmt: skip
    left_alone = overrides | {"train.output_dir": str(tmp_path / "alone")}
    assert wait_for(submit(left_alone, tmp_path / "alone.log", submitted)) == "COMPLETED"
    interrupted = overrides | {"train.output_dir": str(tmp_path / "run")}
    log = tmp_path / "job.log"
    job = submit(interrupted, log, submitted)
    written = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (written.exists() and len(written.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline and job_state(job) in {"PENDING", "CONFIGURING", "RUNNING"}
        time.sleep(0.1)
    interrupt(how, job, log)
    if how == "cancelled and submitted again":
        job = submit(interrupted, log, submitted)
    assert wait_for(job) == "COMPLETED", log.read_text()[-3000:]
    assert "resumed from" in log.read_text()
    final = "final/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "alone" / final).read_bytes()
