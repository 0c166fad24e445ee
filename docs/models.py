"""Train a tiny model of every causal type of transformers, and write the results into docs/models.md. This is no test.

    python docs/models.py             # all of them, twenty minutes of one core
    python docs/models.py bloom opt   # some; the others stay as docs/models.json has them

A tiny model of each type is checked with `check` and trained for two steps, in a process of its own. Either both refuse
it by name, or all of this holds: policy and rollout give a sampled token the same log-probability in both steps; the KL
from the reference is 0 before the first update; and if completions share packs, the gradient is that of one completion
a row with the model's own attention. The exit status is 1 if a type does neither.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from architectures import table
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.toy import toy_path
from grpo_dist.preflight.contents import read_contents
from grpo_dist.preflight.findings import Findings
from grpo_dist.train import train
from grpo_dist.trainer.build import UserError, build, close

HEAD = """# Which models train

{architectures}
## All types

Types that transformers {version} loads with `AutoModelForCausalLM`, each as a tiny model of random weights, in
float32 on a CPU. The end of the page lists types that were not examined. `python docs/models.py` makes this page;
with names of types it examines only those. It is not one of the tests, because all types take twenty minutes. A
trained type made two steps in which policy and rollout gave each sampled token the same log-probability within 0.001
nats, and the KL from the reference was 0 before the first update. If completions share packs, the gradient was that
of one completion a row with the model's own attention, within a thousandth. `check` refuses the same types as this
page.

The tiny models have the type's defaults for sliding windows and other choices of a config. Sequences longer than a
window are computed in packs as well ([architecture.md](architecture.md)). Vision and audio towers of a model are not
trained.

### Trained: {packed} in packs, {rows} one completion a row

| type | computed in | a step of decoding by | adapters, attention |
|---|---|---|---|
{trained}

### Refused: {refused}

| type | why |
|---|---|
{why}

Not examined: {untried}.
"""
PAGE, OUTCOMES = (Path(__file__).with_name(name) for name in ("models.md", "models.json"))
MOST_GAP, MOST_KL, MOST_SHARE = 1e-3, 1e-6, 1e-3
"""Nats a token, nats a token, and share of the gradient's norm, in float32."""
REFUSED_SECONDS = 10.0
"""A refusal comes within so much computing."""
PATIENCE_SECONDS = 900
OPTIONS = [
    "--model.name", "./model", "--model.dtype", "float32", "--reference.dtype", "float32",
    "--data.train_file", "data.jsonl", "--data.answer_column", "null", "--data.eval_file", "null",
    "--data.max_prompt_length", "64", "--rewards", '[{name: "shortness:shortness"}]', "--loss.kl_coeff", "0.04",
    "--logging.trackers", "[]", "--logging.log_completions", "false", "--scoring.num_workers", "1",
    "--rollout.group_size", "4", "--rollout.max_completion_length", "8", "--train.batch_size", "2",
    "--train.num_train_steps", "2", "--train.save_every", "0", "--train.eval_every", "0", "--train.output_dir", "run",
]  # fmt: skip
REWARD = """def shortness(completions, **columns):
    return [-float(len(each)) for each in completions]
"""


def outcome(kind: str, config: Config) -> dict[str, Any]:
    """The result of a type, examined in a process of its own: see `_look`."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_look, args=(kind, config, Path(folder), theirs))
        process.start()
        theirs.close()
        try:
            result = ours.recv() if ours.poll(PATIENCE_SECONDS) else {"fault": f"no end in {PATIENCE_SECONDS} s"}
        except EOFError:
            process.join()
            result = {"fault": f"ended with status {process.exitcode}"}
        process.kill()
        process.join()
    return result


def _look(kind: str, config: Config, folder: Path, results: Any) -> None:
    """Send the result of a type: `fault` if it is neither trained exactly nor refused, else `refused` (the reason), or
    `packs` (None, or the reason against them), `rollouts`, and the largest differences."""
    printed = io.StringIO()
    try:
        torch.set_num_threads(1)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            obstacle = _make(kind)
            result = _checked_and_trained(config)
            if "has no weights" in result.get("refused", ""):
                result = {"fault": f"its weights cannot be made: {obstacle}"}
            results.send(result)
    except BaseException as error:
        results.send({"fault": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500],
                      "printed": printed.getvalue()[-1000:] + traceback.format_exc()[-2000:]})  # fmt: skip
    finally:
        os._exit(0)


def _make(kind: str) -> str | None:
    """Write a tiny model of the type; returns why it is without weights, or None."""
    tokenizer = AutoTokenizer.from_pretrained(toy_path())
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = tiny_config(kind, tokens)
    torch.manual_seed(0)
    obstacle, written = None, None
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained("model")
        written = model.config.model_type
    except (ImportError, AttributeError, ValueError) as error:  # it needs a package, or a part of its config
        obstacle = str(error)
    if written != kind:  # the model has the text's part of the config alone
        config.save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"What is {a} + {a + 5}?"} for a in range(8)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("shortness.py").write_text(REWARD, encoding="utf-8")
    return obstacle


def _checked_and_trained(config: Config) -> dict[str, Any]:
    findings, begun = Findings(), time.process_time()
    read_contents(config, 1, findings)
    checked_seconds = time.process_time() - begun
    begun = time.process_time()
    try:
        log = _trained(config)
    except (UserError, UnfitModel) as error:
        seconds = max(checked_seconds, time.process_time() - begun)
        if str(error) not in findings.problems:
            return {"fault": f"refused, but check finds {findings.problems}: {error}"}
        return {"refused" if seconds < REFUSED_SECONDS else "fault": str(error), "seconds": round(seconds, 1)}
    if findings.problems:
        return {"fault": f"refused by check alone: {findings.problems}"}
    return _compared(config, log)


def _compared(config: Config, log: list[str]) -> dict[str, Any]:
    first, second = _metrics("run")
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in log}
    packs = None if "shared by their groups" in said["rollouts"] else said["rollouts"].partition("(")[2][:-1]
    rollouts = said["rollouts"].rpartition(", ")[2] if packs is None else "one group at a time"
    gap, kl, share = max(each["rollout/logprob_gap_max"] for each in (first, second)), first["kl"], 0.0
    entry: dict[str, Any] = {"packs": packs, "rollouts": rollouts, "attention": said.get("attention"),
                             "adapters": said.get("adapters"), "gap": gap, "kl": kl}  # fmt: skip
    if packs is None:
        _trained(replace(config, model=replace(config.model, attn_implementation="eager"),
                         train=replace(config.train, output_dir="rows")))  # fmt: skip
        norm = _metrics("rows")[0]["grad_norm"]
        entry["share"] = share = abs(first["grad_norm"] - norm) / norm if norm > 0 else 0.0
    if not (gap < MOST_GAP and kl < MOST_KL and share < MOST_SHARE):
        entry["fault"] = "is not exact"
    if not first["grad_norm"] > 0:
        entry["fault"] = "learns nothing"
    return entry


def _trained(config: Config) -> list[str]:
    """Train; returns the lines of the log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    log = io.StringIO()
    handler, logger = logging.StreamHandler(log), logging.getLogger("grpo_dist")
    logger.addHandler(handler)
    try:
        parts, state = build(config)
        try:
            train(parts, state)
        finally:
            close(parts, all_ranks=True)
    finally:
        logger.removeHandler(handler)
    return log.getvalue().splitlines()


def _metrics(directory: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["step"] > 0]


def render(outcomes: dict[str, dict[str, Any]]) -> str:
    """The page."""
    packed = {kind: each for kind, each in outcomes.items() if "packs" in each and each["packs"] is None}
    rows = {kind: each for kind, each in outcomes.items() if each.get("packs")}
    refused = {kind: each["refused"] for kind, each in outcomes.items() if "refused" in each}
    untried = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in packed | rows | refused]
    lines = [
        *(f"| `{kind}` | packs | {each['rollouts']} | {_left_out(each)} |" for kind, each in packed.items()),
        *(f"| `{kind}` | rows: {_cell(each['packs'])} | {each['rollouts']} | {_left_out(each)} |"
          for kind, each in rows.items()),
    ]  # fmt: skip
    return HEAD.format(
        architectures=table(), version=transformers.__version__,
        packed=len(packed), rows=len(rows), refused=len(refused), trained="\n".join(sorted(lines)),
        why="\n".join(f"| `{kind}` | {_cell(refused[kind])} |" for kind in refused),
        untried=", ".join(f"`{kind}`" for kind in untried) or "none",
    )  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _left_out(each: dict[str, Any]) -> str:
    said = [each["adapters"], each["attention"] and "attention: eager"]
    return _cell("; ".join(filter(None, said)))


def walk(kinds: Iterable[str]) -> bool:
    """Examine the types, write the results, and return whether all types are right."""
    config, faults = parse_config(OPTIONS), False
    for kind in kinds:
        result = outcome(kind, config)
        print(kind, json.dumps(result), flush=True)
        faults |= "fault" in result
        known = json.loads(OUTCOMES.read_text()) if OUTCOMES.is_file() else {}
        known.pop(kind, None)
        kept = {} if "fault" in result else {kind: result}
        OUTCOMES.write_text(json.dumps(dict(sorted((known | kept).items())), indent=1) + "\n")
        write_page()
    return not faults


def write_page() -> None:
    """Write the page from the kept results."""
    PAGE.write_text(render(json.loads(OUTCOMES.read_text())))


if __name__ == "__main__":
    sys.exit(not walk(sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
