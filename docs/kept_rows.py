"""Time episodes whose rows keep their cache between turns, beside the same episodes computed again in each turn.

    OMP_NUM_THREADS=1 python docs/kept_rows.py                       # prompts of 256 and 512 tokens

2 prompts × 8 episodes of up to four turns, a model of 27 M random weights in float32. A turn has 16 tokens in the mean,
the same in both ways, and its answer 16 tokens. Prints a row for each length of the prompts: seconds, and the seconds
of all cores.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.cli.bench.workloads import MEDIUM, make_model
from grpo_dist.model import attention
from grpo_dist.rollout import LoadedModel, LocalEngine, NativeDecoder, Request, Sampling, awake
from grpo_dist.rollout.native.kernel import KernelStep

PROMPTS, GROUP, TURNS, TURN, ANSWER, LONGEST_TURN = 2, 8, 4, 16, 16, 96
END = 1
ROW = TURNS * (LONGEST_TURN + ANSWER)
IDS = range(2, MEDIUM.vocabulary)


def play(model: nn.Module, prompt_tokens: int, keeps: bool) -> tuple[int, float, float]:
    """The tokens that were sampled, the seconds, and the seconds of all cores."""
    decoder = NativeDecoder([END], ROW, PROMPTS * prompt_tokens + PROMPTS * GROUP * ROW, step_of=KernelStep)
    draw, sampled = random.Random(0), 0
    prompts = [draw.choices(IDS, k=prompt_tokens) for _ in range(PROMPTS)]
    requests = [Request(group, sample, prompt, stream_key(0, group, sample), max_new_tokens=LONGEST_TURN, keeps=keeps)
                for group, prompt in enumerate(prompts) for sample in range(GROUP)]  # fmt: skip
    engine = LocalEngine(decoder, LoadedModel(model), {})
    start, cpu = time.perf_counter(), time.process_time()
    with awake(engine):
        for turn in range(1, TURNS + 1):
            asked = {(request.group, request.sample): request for request in requests}
            engine.submit(requests, Sampling())
            requests = []
            while asked:
                for answer in engine.poll():
                    request = asked.pop((answer.group, answer.sample))
                    sampled += len(answer.ids)
                    said = random.Random(f"{request.group}/{request.sample}/{turn}").choices(IDS, k=ANSWER)
                    row = [*request.prompt, *answer.ids, *said]
                    if answer.finished and turn < TURNS:
                        offset = len(row) - len(prompts[request.group])
                        requests.append(replace(request, prompt=row, offset=offset, keeps=keeps and turn < TURNS - 1))
                    else:
                        engine.release([(request.group, request.sample)])
    return sampled, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt_tokens", nargs="+", type=int, default=[256, 512])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(MEDIUM, TURN, "float32", Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).eval()
    play(model, min(given.prompt_tokens), keeps=True)  # compiles
    print("| prompt | each turn computes its row again | the row keeps its cache |\n|---|---|---|")
    for prompt_tokens in given.prompt_tokens:
        (some, *again), (others, *kept) = (play(model, prompt_tokens, keeps) for keeps in (False, True))
        assert some == others, "the same episodes"
        cells = [f"{wall:.1f} s ({cpu:.1f} s of all cores)" for wall, cpu in (again, kept)]
        print(f"| {prompt_tokens} tokens | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
