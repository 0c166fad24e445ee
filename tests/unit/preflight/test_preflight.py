"""Checks before a run: every mistake at once, each once, and nothing written by others steers the terminal."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving import Server

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.resume import identity
from grpo_dist.checkpoint.state import TrainState
from grpo_dist.cli.main import main
from grpo_dist.config.mistakes import COMMAND_LINE, read_options
from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.model.config_files import load_model_config
from grpo_dist.preflight.contents import Contents, read_contents
from grpo_dist.preflight.findings import Findings
from grpo_dist.preflight.look import dry_run
from grpo_dist.preflight.servers import check_servers
from grpo_dist.preflight.sizes import describe_memory, describe_steps, strategy_of_launch
from grpo_dist.preflight.trackers import Service, unreachable
from grpo_dist.text.plain import plain, plain_lines

QUICKSTART = ["--config", "configs/quickstart.yaml"]
GOOD: list[list[str]] = [
    [], QUICKSTART, [*QUICKSTART, "--rollout.temperature", "0.7", "--lora=null", "--data.eval_file", "null"],
    [*QUICKSTART, "--preset", "dapo"],
]  # fmt: skip


@pytest.mark.parametrize("words", GOOD, ids=" ".join)
def test_good_options_come_to_what_a_training_would_use(words: list[str]) -> None:
    options = read_options(words)
    assert options.problems == []
    assert options.config == parse_config(words)


def test_given_options_have_a_source() -> None:
    given = read_options([*QUICKSTART, "--lora.r=8"]).given
    assert given["lora.r"].source == COMMAND_LINE and given["lora.r"].value == "8"
    assert given["train.batch_size"].source == "configs/quickstart.yaml"
    assert "train.seed" not in given


def test_all_mistakes_of_a_command_line_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "rolout: {group_size: 4}\n"
        "rollout: {group_size: 2.5, temperature: -1, max_completion_length: 16}\n"
        "train: {batch_size: 0, learning_rate: 3}\n"
        "lora: {use_dora: true}\n"
        "rewards: [{name: math, weight: x, args: {api_key: s3cret}}]\n"
        "loss: {objective: ppo}\n"
    )
    words = ["--config", str(file), "--config=nowhere.yaml", "--optim.learning_rat=1", "--preset", "dapoo",
             "--loss.kl_coeff", "-1", "stray", "--train.seed"]  # fmt: skip
    options = read_options(words)
    expected = {
        "stray": "expected options such as",
        "--train.seed": "nothing given",
        "--preset": "'dapoo' given, expected one of cispo, dapo",
        "rolout": f"given in {file}, but no such option exists; did you mean 'rollout'?",
        "rollout.group_size": f"2.5 given in {file}, expected a whole number",
        "train.learning_rate": "did you mean 'optim.learning_rate'?",
        "lora.use_dora": f"True given in {file}, but no such option exists; lora.use_dora is no option: DoRA is",
        "rewards.weight": f"'x' given in {file}, expected a number",
        "loss.objective": "'ppo' given in",
        "--config": "no file 'nowhere.yaml' in ",
        "optim.learning_rat": "did you mean 'optim.learning_rate'?",
        "train.batch_size": f"0 given, expected 1 or more (in {file})",
        "rollout.temperature": "-1.0 given, expected above 0",
        "loss.kl_coeff": "-1.0 given, expected 0 or more",
    }
    problems = {problem.partition(":")[0].split(" ")[0].strip("'"): problem for problem in options.problems}
    assert problems.keys() == expected.keys() and len(options.problems) == len(expected)
    for key, part in expected.items():
        assert part in problems[key], problems[key]
    assert "s3cret" not in " ".join(options.problems)
    assert options.config.rollout.max_completion_length == 16, "what is right is used"
    assert options.config.train.batch_size == 32, "defaults stand in for what is not"


def test_a_refusal_between_options_that_stays_is_reported_once(tmp_path: Path) -> None:
    options = read_options(["--data.max_prompt_length", "8000"])
    assert len(options.problems) == 1 and options.problems[0].startswith("train.max_tokens_per_pack: 4096 given")


STONES = """
class Stones:
    def reset(self, stones):
        return f"{stones} stones."

    def get_reward(self):
        return 0.0
"""


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"What is {n} + {n}? \x1b[31m\u202e[bold]", "answer": str(2 * n)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = str(tmp_path / "data.jsonl")
    return ["check", "--data.train_file", file, "--data.eval_file", file, "--train.output_dir",
            str(tmp_path / "runs" / "new"), "--data.max_prompt_length=64"]  # fmt: skip


def test_all_options_are_listed_where_asked(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("grpo_dist.preflight.look._look", lambda *_: None)
    assert main(["check", "--defaults"]) == 0
    assert "  optim.betas: " in capsys.readouterr().out


def test_a_check_of_a_good_run_says_what_it_will_be(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*data, "--ranks", "3"]) == 0
    shown, stages = capsys.readouterr()
    assert stages.splitlines()[0] == "importing torch and transformers …" and "trying the rewards" in stages
    for message in ("no problems found", "12 to train on", "math: 1 for gold answers, 0 for answers of other prompts",
                 "up to 86 on each of 3 rank(s)", "M parameters", "of tensors on each rank at the peak", "free in",
                 "starts from the beginning", "tensorboard: installed",
                 "12 of 12 evaluation prompts are also trained on", "[bold]",
                 "data.max_prompt_length: 64   # the"):  # fmt: skip
        assert message in shown, message
    assert "\x1b" not in shown and "\u202e" not in shown
    assert not (tmp_path / "runs").exists(), "a check leaves nothing behind"
    assert "`python -m grpo_dist check --defaults` lists them" in shown and "optim.betas" not in shown


def test_a_reward_of_episodes_is_not_tried_on_gold_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", "configs/guess_number.yaml", "--train.max_tokens_per_pack", "512",
                 "--train.output_dir", str(tmp_path / "run")]) == 0  # fmt: skip
    assert "environment: not tried, it needs an episode" in capsys.readouterr().out


def test_environments_are_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts are shown as an episode begins; rows on which none can begin are named before a run meets them."""
    (tmp_path / "stones.py").write_text(STONES)
    for name, row in {"train": {"stones": 7}, "eval": {"prompt": "?"}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", "--train.max_tokens_per_pack", "128", "--data.max_prompt_length", "64",
                 "--rollout.max_completion_length", "64", "--model.name", "toy-tools", "--environment.factory",
                 "stones:Stones", "--data.prompt_column",
                 "null", "--data.answer_column", "null", "--rewards", "[{name: environment}]", "--train.output_dir",
                 str(tmp_path / "run"), "--data.train_file", str(tmp_path / "train.jsonl"), "--data.eval_file",
                 str(tmp_path / "eval.jsonl")]) == 2  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens: 7 stones. Answer:" in shown and "prompts are also trained on" not in shown
    assert "eval.jsonl): environment.factory: reset fails on row 0, which has prompt: TypeError" in shown


def test_problems_of_data_rewards_and_machine_together(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "occupied").write_text("")
    assert main([*data, "--data.eval_file", "nowhere.jsonl", "--data.answer_column", "anser", "--rewards",
                 '[{name: mth}]', "--logging.trackers", "[tensorbord]", "--model.name", str(tmp_path / "no_model"),
                 "--train.output_dir", str(tmp_path / "occupied" / "run")]) == 2  # fmt: skip
    shown = capsys.readouterr().out
    for message in ("rewards: 'mth' is not a built-in reward; did you mean 'math'?", "no_model' given, but there is no",
                 "has no column 'anser'; it has prompt, answer. Set data.answer_column to 'answer'", "nowhere.jsonl",
                 "occupied cannot be written to", "'tensorbord' given", "6 problem(s)"):  # fmt: skip
        assert message in shown, message


def test_rewards_that_fail_on_samples(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(
        "import time\n"
        "def reward(completions, **kwargs): raise KeyError('no such thing \\x1b[2J')\n"
        "def hanging(completions, **kwargs): time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--rewards", '[{name: "failing:reward"}, {name: "failing:hanging"}]', "--scoring.timeout_seconds", "0.5"]
    assert main([*data, *words]) == 2
    shown = capsys.readouterr().out
    assert "'failing:reward' failed on 16 of 16 completions" in shown and "no such thing" in shown
    assert "'failing:hanging' failed on 1 of 1 completions" in shown and "(timeout)" in shown, "one time limit, not 16"
    assert "2 problem(s)" in shown and "\x1b" not in shown
    assert "no reward scores" not in shown, "they gave no scores to compare"


def test_what_does_not_fit_is_a_problem(
    data: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**20))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(data) == 2
    shown = capsys.readouterr().out
    assert "1. memory: 0." in shown and "a rank has 0.00 GiB. Lower train.max_tokens_per_pack (now 4096)" in shown
    assert "2. train.output_dir" in shown and "lower train.keep_checkpoints (now 2)" in shown


def test_each_node_of_a_launch_is_looked_at_once(
    data: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert dry_run([*data[1:], "--logging.trackers", "[tensorbord]"]) == 2
    shown, stages = capsys.readouterr()
    assert "importing" not in stages, "which the main rank says"
    assert f"{socket.gethostname()} 1 problem(s)" in shown and "'tensorbord' given" in shown
    assert "options given" not in shown and "defaults" not in shown, "which the main rank says"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dry_run([*data[1:], "--logging.trackers", "[tensorbord]"]) == 0
    assert capsys.readouterr().out == ""


def test_plain_text_is_one_harmless_line() -> None:
    assert plain("a\x1b[2Jb\r\n\u202ec\u2066\x07\x9b", 100) == "a\N{REPLACEMENT CHARACTER}[2Jb  " + (
        "\N{REPLACEMENT CHARACTER}c" + "\N{REPLACEMENT CHARACTER}" * 3
    )
    assert plain("x" * 1_000_000, 10) == "xxxxx … xxxxx"
    assert plain("naïve 数学 ∑", 20) == "naïve 数学 ∑"
    assert plain_lines("one\x1b[1m\ntwo\r\n") == "one\N{REPLACEMENT CHARACTER}[1m\ntwo \n"


def test_a_tracker_that_answers_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        service = Service("TRACKER_ADDRESS", f"http://127.0.0.1:{port}", "TRACKER_KEY", ".tracker/.netrc")
        assert unreachable(service) == "there are no credentials for 127.0.0.1: log in, or set TRACKER_KEY"
        (tmp_path / ".tracker").mkdir()
        (tmp_path / ".tracker" / ".netrc").write_text("machine 127.0.0.1 login user password s3cret")
        assert unreachable(service) is None
    assert "127.0.0.1 does not answer within 3 s" in (unreachable(service) or "")
    monkeypatch.setenv("TRACKER_ADDRESS", "./local_directory")
    assert unreachable(service) is None, "a local one needs no host"


def test_what_would_be_resumed(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs" / "new" / "checkpoints"
    config = read_options(data[1:]).config
    contents = read_contents(config, 1, Findings())
    meta = TrainState(7, config.loss.kl_coeff, contents.sampler).meta() | {
        "identity": identity(config, contents.model_config, contents.prompts), "config": {}, "versions": {},
    }  # fmt: skip
    checkpoint.save(root, 7, {"x": torch.zeros(1)}, meta, keep=2)
    assert main(data) == 0
    assert f"resumes from {root / 'step_7'}" in capsys.readouterr().out
    assert main([*data, "--train.seed", "3", "--train.resume", "auto"]) == 2
    assert "belongs to another run:   seed: 0 -> 3   options that differ: " in capsys.readouterr().out
    assert main([*data, "--train.resume", "never"]) == 2
    assert "train.resume is `never` but" in capsys.readouterr().out
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert main([*data, "--model.tokenizer", str(tmp_path), "--data.template_date", "null"]) == 2
    out = capsys.readouterr().out
    assert "model.name" in out and f"resumes from {root / 'step_7'}" in out, "prompts are compared once they are read"


def test_servers_are_asked_and_environments_tried(tmp_path: Path) -> None:
    def look(**options: Any) -> Findings:
        findings, rollout = Findings(), RolloutConfig(engine="vllm", vllm=VllmConfig(**options))
        check_servers(Config(rollout=rollout), None, findings)
        return findings

    def models(longest: int) -> Server:
        return Server(lambda _: {"data": [{"id": "policy", "max_model_len": longest}]})

    with models(1024) as long, models(100) as short:
        findings = look(urls=[long.url, short.url])
    assert f"{long.url} serves policy, up to 1024 tokens" in findings.results["servers"]
    assert "--logprobs-mode processed_logprobs" in findings.results["servers"][0], "how to start one"
    assert len(findings.problems) == 1 and f"{short.url} serves sequences of 100 tokens" in findings.problems[0]
    assert "does not answer" in look(urls=[long.url]).problems[0]
    (tmp_path / "no").write_bytes(b"\x7fELF")
    (tmp_path / "no").chmod(0o755)
    for python, message in {sys.executable: "cannot import vllm", str(tmp_path / "no"): "does not start"}.items():
        (problem,) = look(python=python).problems
        assert message in problem and "launch/setup_vllm.sh" in problem


@pytest.mark.parametrize(
    ("variables", "num_ranks", "expected"),
    [({}, 1, "DDP"), ({}, 2, "ZeRO-2"), ({"WORLD_SIZE": "2"}, 2, "DDP"),
     ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, 2, "FSDP2"),
     ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}, 1, "DDP"),
     ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 2, "ZeRO-3")],
)  # fmt: skip
def test_the_strategy_is_the_launchs(
    variables: dict[str, str], num_ranks: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert strategy_of_launch(num_ranks) == expected


@pytest.mark.parametrize(("attention", "packs"), [("auto", 2), ("eager", 8)])
def test_packs_are_counted_as_the_model_takes_them(attention: str, packs: int) -> None:
    """Two prompts with four completions each: a pack for each prompt, or one for each sequence."""
    model, findings = ModelConfig(attn_implementation=attention), Findings()
    config = Config(model, data=DataConfig(max_prompt_length=64), rollout=RolloutConfig(4, 16),
                    train=TrainConfig(batch_size=2, max_tokens_per_pack=128))  # fmt: skip
    describe_steps(config, Contents(model_config=load_model_config(model)), 1, findings)
    assert f"{packs} pack(s) on each rank" in findings.results["steps"][1]


def test_a_launch_that_cannot_be_is_a_problem_and_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    findings = Findings()
    contents = Contents(model_config=load_model_config(ModelConfig()))
    assert describe_memory(Config(), contents, 2, findings) is None
    assert findings.problems and "zero_stage 0 given, expected 1, 2 or 3" in findings.problems[0]


@pytest.mark.parametrize(("said", "problem"), [("no JSON", "model.name: 'a' given: no JSON"),
                                               ("model.tokenizer: no", "model.tokenizer: no")])  # fmt: skip
def test_a_problem_names_the_option_that_it_is_about(said: str, problem: str) -> None:
    findings = Findings()
    with findings.attempt("model.name: 'a' given: "):
        raise ValueError(said)
    assert findings.problems == [problem]
