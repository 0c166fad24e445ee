"""Numbers and machines that fail: every rank does the same, and no checkpoint is harmed."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, TINY, adapters, command, launch, metrics, train

from grpo_dist.checkpoint import store as checkpoint


def faulty(
    strategy: str | None, num_processes: int, run: Path, fault: str, *arguments: str, rank: str = "0"
) -> tuple[int, str]:
    """Run with a fault; exit status and everything printed."""
    done = launch(strategy, num_processes, *TINY, "--train.output_dir", str(run), *arguments,
                  program=["tests/fault/faulty.py"],
                  environment={"FAULT": fault, "FAULT_RANK": rank, "PYTHONPATH": str(ROOT)})  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [*(pytest.param(each, 2, marks=pytest.mark.slow) for each in ("ddp", "zero2")), ("zero3", 2), ("fsdp2", 2)],
)
def test_a_nan_on_one_rank(strategy: str, num_processes: int, tmp_path: Path) -> None:
    status, told = faulty(
        strategy, num_processes, tmp_path / "run", "nan@loss:2", "--train.num_train_steps", "3", rank="1"
    )
    assert status == 0, told[-4000:]
    lines = metrics(tmp_path / "run")
    assert [line["update/skipped"] for line in lines[1:]] == [0, 1, 0]
    assert "no rank took the step" in told
    assert (tmp_path / "run" / "bad_updates" / "step_2.safetensors").is_file()
    assert all(bool(tensor.isfinite().all()) for tensor in adapters(tmp_path / "run").values())


def test_too_many_in_a_row(tmp_path: Path) -> None:
    status, told = faulty(None, 1, tmp_path / "run", "nan@loss:2", "--train.max_bad_updates", "1")
    assert status == 1
    assert "1 updates in a row had gradients that are not finite" in told and "Traceback" not in told


def test_a_full_disk(tmp_path: Path) -> None:
    status, told = faulty("ddp", 2, tmp_path / "run", "enospc@shards:2", "--train.save_every", "1")
    assert status == 1
    assert "No space left on device" in told
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_1"
    train("ddp", 2, tmp_path / "run", "--train.save_every", "1")


@pytest.mark.parametrize("fault", [
    "vanish@update:2", "enospc@metrics:2", *(pytest.param(f"enospc@{point}:1", marks=pytest.mark.slow)
                                             for point in ("metrics", "manifest", "export"))])  # fmt: skip
def test_a_file_that_cannot_be_written_is_one_line(fault: str, tmp_path: Path) -> None:
    """Also where the directory is gone, and only files that the run has begun are to be written."""
    run = tmp_path / "run"
    status, told = faulty(None, 1, run, fault, "--train.save_every", "1", "--logging.log_completions", "false",
                          "--logging.trackers", "[]")  # fmt: skip
    assert status == 1 and "Traceback" not in told and told.count("error: ") == 1, told[-4000:]
    assert f"train.output_dir: a file in {run} cannot be written" in told
    assert "the same command then goes on from what is complete" in told
    if "vanish" not in fault:
        train(None, 1, run, "--train.save_every", "1", "--logging.log_completions", "false")
        assert [line["step"] for line in metrics(run)] == list(range(4))


def test_a_save_that_fails_may_be_passed_over(tmp_path: Path) -> None:
    run, often = tmp_path / "run", ("--train.save_every", "1", "--train.max_failed_saves", "1")
    status, told = faulty("ddp", 2, run, "enospc@manifest:3", *often)
    assert status == 0, told[-4000:]
    assert "going on without a checkpoint of step 2" in told and "No space left on device" in told
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == ["step_3", "step_1"]
    assert not list((run / "checkpoints").glob("tmp_*"))


def test_the_last_save_may_not_fail(tmp_path: Path) -> None:
    status, told = faulty(None, 1, tmp_path / "run", "enospc@manifest:1", "--train.max_failed_saves", "9")
    assert status == 1 and "No space left on device" in told


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path: Path) -> None:
    """Everything in it has the right names and checksums, and one tensor is not the model's."""
    run = tmp_path / "run"
    train(None, 1, run, "--train.num_train_steps", "1")
    tensors, meta = checkpoint.load(run / "checkpoints" / "step_1")
    name = next(name for name in tensors if name.startswith("weight/"))
    larger = torch.cat([tensors[name], tensors[name]])
    checkpoint.save(run / "checkpoints", 2, tensors | {name: larger}, meta | {"step": 2}, keep=2)
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(run))
    assert done.returncode == 1 and done.stderr.count("does not fit this run") == 1, done.stderr[-3000:]
    assert f"{run / 'checkpoints' / 'step_2'} does not fit this run (ValueError: {name} has shape" in done.stderr


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system that has room for two checkpoints of 2.3 MiB; and again on a larger one."""
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    train = [*command(None, 1), *TINY, "--train.output_dir", str(run), "--train.save_every", "1"]  # fmt: skip
    script = ('mount -t tmpfs -o size=6m none "$1" || exit 77; shift; "$@"; echo "first: $?"; '
              'mount -o remount,size=99m "$0"; "$@"; echo "second: $?"; ls "$0/run/checkpoints"')  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, str(run.parent), str(run.parent), *train], cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a file system")
    assert "first: 1" in done.stdout and "No space left on device" in done.stderr, done.stderr[-3000:]
    assert "second: 0" in done.stdout and done.stdout.split()[-2:] == ["step_2", "step_3"]


@pytest.mark.slow
def test_an_output_directory_that_vanishes(tmp_path: Path) -> None:
    """Moved away in the middle of the run: all ranks end, and what was saved is whole where it is now."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = subprocess.Popen(
        [*command("ddp", 2), *TINY, "--train.num_train_steps", "5000", "--train.output_dir", str(run),
         "--train.save_every", "1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while checkpoint.newest(run / "checkpoints") is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    run.rename(moved)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and str(run) in told
    newest = checkpoint.newest(moved / "checkpoints")
    assert newest is not None
    shutil.rmtree(run, ignore_errors=True)
    moved.rename(run)
    train(None, 1, run, "--train.num_train_steps", str(int(newest.name.removeprefix("step_")) + 1))


REWARDS = '''
def nothing_to_learn(completions, trainer_state, **_):
    """The same for all in even steps, and not applicable in odd ones."""
    return [None if trainer_state.global_step % 2 else 0.5] * len(completions)

def sometimes_raises(completions, answer, **_):
    if "14" in answer:
        raise ArithmeticError("fourteen is too much")
    return [1.0] * len(completions)
'''


def test_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "fools.py").write_text(REWARDS)
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"),
                  "--rewards", '[{name: "fools:nothing_to_learn"}]', "--rollout.max_completion_length", "2",
                  "--train.num_train_steps", "3",
                  environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = metrics(tmp_path / "run")[1:]
    assert [line["reward/groups_zero_std"] for line in lines] == [1.0] * 3
    assert [line["reward/unscored"] for line in lines] == [0.0, 1.0, 0.0]
    assert [(line["loss"], line["advantage/abs_mean"], line["grad_norm"]) for line in lines] == [(0.0, 0.0, 0.0)] * 3
    learned = [tensor for name, tensor in adapters(tmp_path / "run").items() if "lora_B" in name]
    assert learned and not any(bool(tensor.any()) for tensor in learned)


def test_all_completions_truncated_and_left_out(tmp_path: Path) -> None:
    """No rank has a token to learn from."""
    done = launch("zero2", 2, *TINY, "--train.output_dir", str(tmp_path / "run"),
                  "--rollout.max_completion_length", "1", "--loss.mask_truncated", "true",
                  "--train.num_train_steps", "2", "--loss.kl_coeff", "0.1")  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for line in metrics(tmp_path / "run")[1:]:
        assert line["completion/truncated"] == 1.0 and line["loss"] == 0.0


def test_the_first_rank_says_why_although_it_is_the_last_to_end(tmp_path: Path) -> None:
    (tmp_path / "fools.py").write_text(REWARDS.replace('if "14" in answer', "if True"))
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"),
                  "--rewards", "[{name: fools:sometimes_raises}]", program=["tests/fault/faulty.py"],
                  environment={"FAULT": "late@word:1", "PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr[-4000:]


@pytest.mark.slow
def test_a_reward_that_raises_too_often(tmp_path: Path) -> None:
    """Every rank ends with the message, the prompt and the traceback, whichever of them scored the completion."""
    (tmp_path / "fools.py").write_text(REWARDS)
    rows = [{"prompt": f"What is {a} + 4? Answer with an integer.", "answer": str(a + 4)} for a in range(14)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"),
                  "--data.train_file", str(tmp_path / "rows.jsonl"), "--rewards", '[{name: "fools:sometimes_raises"}]',
                  "--scoring.error_budget", "0.05", environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 1
    assert "14.3% of the completions could not be scored" in done.stderr  # five of a step's thirty-five
    assert "(raised) on a completion of prompt 10: ArithmeticError: fourteen is too much" in done.stderr
    assert 'raise ArithmeticError("fourteen is too much")' in done.stderr
    assert "scoring.error_budget allows 5.0%" in done.stderr


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_out_of_memory_on_one_rank_ends_all_and_says_what_to_change(rank: str, tmp_path: Path) -> None:
    """The other one stands in a collective, where no signal reaches Python: its own thread ends it."""
    status, told = faulty("ddp", 2, tmp_path / "run", "oom@update:2", rank=rank)
    assert status == 1
    assert f"rank {1 - int(rank)} ends: rank {rank} died: OutOfMemoryError: CUDA out of memory" in told
    assert "in happen" in told
    for option in ("train.max_tokens_per_pack (now 2048)", "rollout.max_tokens_in_flight", "gradient_checkpointing"):
        assert option in told


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "is in use by" in done.stderr


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(None, 1, run, "--train.num_train_steps", "1")
    refused = launch(None, 1, *TINY, "--train.output_dir", str(run), "--train.seed", "3", "--lora.r", "8")
    assert refused.returncode == 2
    assert "seed: 0 -> 3" in refused.stderr and "lora.r: 32 -> 8" in refused.stderr
    applied = launch(None, 1, *TINY, "--train.output_dir", str(run), "--train.num_train_steps", "2",
                     "--optim.learning_rate", "2e-4")  # fmt: skip
    assert applied.returncode == 0, applied.stderr[-3000:]
    assert "optim.learning_rate: 0.001 -> 0.0002" in applied.stderr


def test_a_tracker_that_fails(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"),
                  "--train.num_train_steps", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tracker tensorboard failed" in done.stderr
    assert len(metrics(tmp_path / "run")) == 3
