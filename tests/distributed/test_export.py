"""What a run has trained, exported from its end and from its checkpoints, and talked to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import Hub
from launching import ROOT, train
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_dist.cli.main import main
from grpo_dist.model.toy import toy_path

QUESTION = "What is 12 - 7? Answer with an integer."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with a checkpoint after the second and the third."""
    return train(None, 1, tmp_path_factory.mktemp("runs") / "run", "--train.num_train_steps", "3", "--train.save_every",
                 "1", "--optim.learning_rate", "1e-2")  # fmt: skip


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Run the verb as a user would, and return where to and what it printed."""

    def call(source: Path, *arguments: str) -> tuple[Path, str]:
        assert main(["export", str(source), "--out", str(tmp_path / "out"), *arguments]) == 0, capsys.readouterr().err
        return tmp_path / "out", capsys.readouterr().out

    return call


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a saved model."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models are the same bits under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """Logits of a fixed row."""
    return model.eval()(input_ids=torch.arange(40)[None]).logits[0].float()


@pytest.mark.parametrize(("place", "size"), [("", "300KB"), ("final", "300kb"), ("checkpoints/step_3", "0.3 Mb")])
def test_the_end_from_wherever_it_is_taken(
    place: str, size: str, run: Path, export: Callable[..., tuple[Path, str]]
) -> None:
    out, told = export(run / place, "--max_shard_size", size)
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    assert same(weights(out), weights(run / "final"))
    assert (out / "README.md").read_text() == (run / "final" / "README.md").read_text()
    assert f"vllm serve {out}" in told and f"transformers serve {out}" in told


def test_an_earlier_checkpoint_is_another_model(
    run: Path, export: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    earlier = run / "checkpoints" / "step_2"
    out, _ = export(earlier)
    assert not same(weights(out), weights(run / "final"))
    assert "| step 2" not in (out / "README.md").read_text() and "after 2 steps" in (out / "README.md").read_text()
    assert main(["export", str(earlier), "--to", "adapter", "--out", str(tmp_path / "adapter")]) == 0
    base = AutoModelForCausalLM.from_pretrained(toy_path(), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert torch.allclose(logits(adapted), logits(merged), atol=1e-4)


def test_the_adapter_is_the_runs(run: Path, export: Callable[..., tuple[Path, str]]) -> None:
    out, told = export(run, "--to", "adapter")
    assert same(weights(out), weights(run / "final" / "adapter"))
    assert "--enable-lora --max-lora-rank 32 --lora-modules" in told
    assert "library_name: peft" in (out / "README.md").read_text()


def test_weights_can_be_rounded(run: Path, export: Callable[..., tuple[Path, str]]) -> None:
    out, _ = export(run, "--dtype", "bfloat16")
    exact, rounded = weights(run / "final"), weights(out)
    assert same(rounded, {name: tensor.bfloat16() for name, tensor in exact.items()})


def test_a_small_update_is_kept_or_said_to_be_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step at a small learning rate in bfloat16."""
    run = train(None, 1, tmp_path / "run", "--train.num_train_steps", "1", "--optim.learning_rate", "1e-6",
                "--model.dtype", "bfloat16")  # fmt: skip

    def export(name: str, *arguments: str) -> tuple[Path, str]:
        capsys.readouterr()
        assert main(["export", str(run), "--out", str(tmp_path / name), *arguments]) == 0
        return tmp_path / name, capsys.readouterr().out

    out, printed = export("exact")
    assert {tensor.dtype for tensor in (weights(run / "final") | weights(out)).values()} == {torch.float32}
    assert same(weights(out), weights(run / "final"))
    exact, rounded = map(float, re.findall(r"([\d.]+)%", printed))
    assert "weights in float32, which keep" in printed and exact >= 99 > 50 > rounded
    assert 0 < float(re.findall(r"KL from the policy is (\S+) nats", printed)[0]) < 1e-2
    out, printed = export("rounded", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert f"weights in bfloat16, which keep {rounded}% of what" in printed and f"(float32: {exact}%)" in printed


def test_a_run_that_has_not_ended(run: Path, export: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["num_train_steps"] = 9
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_3")
    out, told = export(tmp_path / "run")
    assert "step_2" in told and not same(weights(out), weights(run / "final"))


def test_the_gguf_recipe_runs_the_converter(run: Path, tmp_path: Path) -> None:
    """Up to llama.cpp's own programs, which recorders stand in for."""
    out = tmp_path / "a model"
    assert main(["export", str(run), "--to", "gguf-recipe", "--out", str(out)]) == 0
    llama, programs = tmp_path / "llama.cpp", tmp_path / "programs"
    for folder in (llama / "build" / "bin", programs):
        folder.mkdir(parents=True)
    (llama / "convert_hf_to_gguf.py").write_text(
        "import os, sys; open(sys.argv[5], 'x').write(' '.join(sorted(os.listdir(sys.argv[1]))))"
    )
    environment = f'mkdir -p "$3/bin"; ln -s {sys.executable} "$3/bin/python"; ln -s /bin/true "$3/bin/pip"'
    for program, text in {programs / "cmake": "exit 0", programs / "python": environment,
                          llama / "build/bin/llama-quantize": 'cp "$1" "$2.$3"'}.items():  # fmt: skip
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    subprocess.run([out / "to_gguf.sh"], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL,
                   env=os.environ | {"LLAMA_CPP": str(llama), "PATH": f"{programs}:{os.environ['PATH']}"})  # fmt: skip
    assert "model.safetensors" in (out / "a model-q4_k_m.gguf.Q4_K_M").read_text()


def test_the_hub_gets_what_was_written(
    run: Path, export: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        out, told = export(run, "--push_to_hub", "me/model")
    assert hub.created[0]["visibility"] == "private"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert f"uploaded to {hub.url}/me/model" in told


def test_mistakes_are_one_line_each(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shutil.copytree(run / "checkpoints" / "step_2", tmp_path / "step_2")
    with (damaged / "state.safetensors").open("r+b") as file:
        file.write(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ([tmp_path / "nowhere"], "expected that of a run"),
        ([damaged], "damaged"),
        ([run, "--out", tmp_path / "full"], "not empty"),
        ([run, "--to", "adapter", "--dtype", "bfloat16"], "--dtype"),
        *(
            ([run, f"--max_shard_size={size}"], f"{size!r} given, expected a size in KB, MB, GB or TB, such as 500MB")
            for size in ("5GiB", "0.0GB", "-1GB", "1e3MB", "500", "nanGB", "1.GB", "5\N{KELVIN SIGN}B")
        ),
        ([run, "--push_to_hub", "my model"], "my model"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert not (run / "exports").exists()
    cut = shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoints"))
    weights = cut / "final" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for verb, *options in (("export", "--out", str(tmp_path / "new")), ("chat", "--prompt", QUESTION)):
        assert main([verb, str(cut), *options]) == 2
        assert f"the adapter in {weights.parent} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "new").exists(), "what is written in part is no model"
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), "--too", "adapter"])
    assert "--too; did you mean --to?" in capsys.readouterr().err


def test_chat_has_both_answers(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["chat", str(run), "--prompt", QUESTION]) == 0
    once = capsys.readouterr().out
    assert once == "--- base\n 5\n--- after 3 steps\n 5\n"
    lines = iter([QUESTION, "What is 3 + 4? Answer with an integer.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(run / "checkpoints" / "step_2"), "--temperature", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("--- after 2 steps") == 2
