"""Episodes of a real training: ranks and interruptions change nothing, and only what was sampled is learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, adapters, completions, launch, metrics, relative_difference, without_its_last_step
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_dist.model.toy import toy_path

KL = 0.04
OPTIONS = (
    "--config", "configs/calculator.yaml", "--model.dtype", "float32", "--reference.dtype", "float32",
    "--train.num_train_steps", "2", "--train.batch_size", "3", "--rollout.group_size", "4", "--train.num_eval_prompts",
    "4", "--train.eval_every", "0", "--train.save_every", "1", "--optim.max_grad_norm", "1e6",
    "--train.max_tokens_per_pack", "300", "--loss.kl_coeff", str(KL), "--scoring.num_workers", "1",
    "--optim.scheduler", "constant", "--rewards", '[{name: math}, {name: "noting:note", weight: 0.3}]',
)  # fmt: skip
REWARD = '''
import json

def note(completion_ids, completions, log_extra, **columns):
    """The number of messages; the ids are written down."""
    log_extra("ids", [json.dumps(ids) for ids in completion_ids])
    return [float(len(messages)) for messages in completions]
'''


def train(strategy: str | None, num_processes: int, directory: Path, *arguments: str) -> Path:
    """A training that must succeed; returns its output directory."""
    done = launch(strategy, num_processes, *arguments, "--train.output_dir", str(directory))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return directory


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "noting.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        yield


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(None, 1, tmp_path_factory.mktemp("one"), *OPTIONS)


def learned(directory: Path) -> dict[str, torch.Tensor]:
    """B starts at zero: it holds nothing but updates."""
    return {name: tensor for name, tensor in adapters(directory).items() if "lora_B" in name}


@pytest.mark.parametrize(("strategy", "num_processes"), [("ddp", 2), pytest.param("zero3", 2, marks=pytest.mark.slow)])
def test_ranks_play_the_same_episodes(strategy: str, num_processes: int, one_process: Path, tmp_path: Path) -> None:
    other = train(strategy, num_processes, tmp_path / "run", *OPTIONS)
    expected, got = completions(one_process), completions(other)
    for name in ("completion", "reward/environment/conversation", "advantage", "reward/math"):
        assert [row[name] for row in got] == [row[name] for row in expected], name
    traces, others = ([row["trace"] and json.loads(row["trace"]) for row in rows] for rows in (expected, got))
    for a, b in zip(filter(None, traces), filter(None, others), strict=True):
        assert (a["text"], a["by"]) == (b["text"], b["by"])
        assert a["entropy"] == pytest.approx(b["entropy"], rel=0.02, abs=1e-4)
    assert relative_difference(learned(one_process), learned(other)) <= 1e-4
    for a, b in zip(metrics(one_process)[1:], metrics(other)[1:], strict=True):
        for name in ("loss", "kl", "grad_norm", "environment/turns", "environment/calls_answered",
                     "environment/context_tokens"):  # fmt: skip
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name


def test_a_run_goes_on_from_its_checkpoint(one_process: Path, tmp_path: Path) -> None:
    again = without_its_last_step(one_process, tmp_path / "run")
    train(None, 1, again, *OPTIONS)
    assert relative_difference(adapters(one_process), adapters(again)) == 0
    assert completions(one_process) == completions(again)


def test_rows_over_pages_as_on_a_gpu_play_the_same_episodes(one_process: Path, tmp_path: Path) -> None:
    """With room for a few rows at once: some go on while first turns wait."""
    pytest.importorskip("triton")
    program = [str(Path(__file__).with_name("over_pages.py"))]
    done = launch(None, 1, *OPTIONS, "--train.output_dir", str(tmp_path / "run"), "--rollout.max_tokens_in_flight",
                  "1000", program=program)  # fmt: skip
    assert done.returncode == 0 and "over pages" in done.stderr, done.stdout[-2000:] + done.stderr[-6000:]
    expected, got = completions(one_process), completions(tmp_path / "run")
    for name in ("completion", "reward/environment/conversation", "advantage", "reward/math"):
        assert [row[name] for row in got] == [row[name] for row in expected], name
    assert metrics(one_process)[1]["environment/turns"] > 1


def sampled_by_text(ids: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens of a row were sampled, read off the row alone: all up to an end, and all after the next head."""
    head, sampled, mine = tokenizer("Answer:")["input_ids"], [], True
    for place, token in enumerate(ids):
        sampled.append(mine)
        if mine:
            mine = token != tokenizer.eos_token_id
        else:
            mine = ids[place - len(head) + 1 : place + 1] == head
    return sampled


def assert_traced(row: dict[str, Any], ids: list[int], sampled: Any, logits: Any, logprobs: Any) -> bool:
    """Whether a row has a trace, which has to say of each token what the model says."""
    if not row["trace"]:
        return False
    trace = json.loads(row["trace"])
    assert [by == "m" for by in trace["by"]] == sampled.tolist() and len(trace["text"]) == len(ids)
    answers = [text["content"] for text in json.loads(row["reward/environment/conversation"]) if text["role"] == "tool"]
    by_tools = "".join(text for text, by in zip(trace["text"], trace["by"], strict=True) if by == "t")
    assert by_tools == "".join(answers[: trace["by"].count("xt")])
    both = [p + gap for p, gap in zip(trace["logprob"], trace["gap"], strict=True)]
    assert both == pytest.approx(logprobs.tolist(), rel=0.01, abs=1e-4)
    entropies = -(torch.log_softmax(logits, -1) * torch.softmax(logits, -1)).sum(-1)[sampled]
    assert trace["entropy"] == pytest.approx(entropies.tolist(), rel=0.01, abs=1e-4)
    return True


def test_the_gradient_is_that_of_the_sampled_tokens(one_process: Path) -> None:
    """The second step's, against a loop over its rows at the first step's checkpoint."""
    before, after = (load_file(one_process / "checkpoints" / f"step_{n}" / "state.safetensors") for n in (1, 2))
    path = toy_path("toy-tools")
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = before[f"weight/model.{name}"]
    rows = [row for row in completions(one_process) if row["step"] == 2]
    loss, turns, traced = torch.zeros(()), 0, 0
    for row in rows:
        ids, prompt = json.loads(row["reward/note/ids"]), tokenizer(row["prompt"])["input_ids"]
        sampled = torch.tensor(sampled_by_text(ids, tokenizer))
        assert row["tokens"] == int(sampled.sum())
        turns += sum(message["role"] == "assistant" for message in json.loads(row["reward/environment/conversation"]))
        places = torch.arange(len(ids)), torch.tensor(ids)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)[places]
        with torch.no_grad(), model.disable_adapter():
            plain = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        gap = (torch.log_softmax(plain, -1)[places] - logprobs)[sampled]
        ratio = (logprobs - logprobs.detach())[sampled].exp()
        traced += assert_traced(row, ids, sampled, logits, logprobs[sampled])
        loss = loss + (-ratio * row["advantage"] + KL * (gap.exp() - 1 - gap)).mean() / len(rows)
    assert turns > len(rows), "some rows have several turns"
    context = sum(len(json.loads(row["reward/note/ids"])) - row["tokens"] for row in rows)
    assert metrics(one_process)[2]["environment/context_tokens"] == pytest.approx(context / len(rows)) and context
    assert 0 < metrics(one_process)[2]["environment/tool_seconds"] < 60
    assert traced == 4, "one group"
    assert metrics(one_process)[2]["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            taken = (after[f"exp_avg/model.{name}"] - 0.9 * before[f"exp_avg/model.{name}"]) / 0.1
            assert float((taken - parameter.grad).norm()) <= 1e-3 * float(parameter.grad.norm()) + 1e-7, name
            compared += float(parameter.grad.norm()) > 0
    assert compared > 10
