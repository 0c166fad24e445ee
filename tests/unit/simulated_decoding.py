"""What a step of the paged engine costs on the simulated device, and what its rows read; as JSON.

    python tests/unit/simulated_decoding.py [modules | experts] > RESULT.json

Triton is replaced: each of its kernels counts as one and computes nothing, but that every token drawn is 7. What they
compute is tested in Triton's interpreter (`rollout/test_triton.py`). Kernels do not depend on sizes, so the model has
tiny ones. Every layer takes as many kernels as another, so that 28 layers follow from 1 and 2.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import types
import weakref
from collections import Counter, deque
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from simulated_cuda import install
from simulated_device import CUDA, SEEN
from simulated_kernels import histc, put_triton_in

install()
put_triton_in()

TOKEN = 7
LAUNCHED: Counter[str] = Counter()


class Kernel:
    """A kernel of Triton's, launched as `kernel[grid](arguments)`."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__
        self.arguments = function.__code__.co_varnames[: function.__code__.co_argcount]

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        assert all(size > 0 for size in grid)
        return self

    def __call__(self, *args: Any, num_warps: int = 4, **kwargs: Any) -> None:
        """Count a launch with all of its arguments."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        assert given.keys() == {*self.arguments}, (self.name, given.keys() ^ {*self.arguments})
        LAUNCHED[self.name] += 1
        SEEN.kernels += 1
        if self.name == "draw_token":
            fill(given["token"], TOKEN)
            fill(given["logprob"], -1.0)


def fill(tensor: Any, value: float) -> None:
    """Write into a tensor as a kernel does, also while a graph is captured."""
    bare = getattr(tensor, "elem", tensor)
    if SEEN.capture is not None:
        SEEN.capture.append(([], lambda: bare.fill_(value)))
    bare.fill_(value)


triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
language.constexpr = lambda value: value
triton.language, triton.jit = language, Kernel
triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: 1 << (n - 1).bit_length()
sys.modules |= {"triton": triton, "triton.language": language}

from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, Qwen2Config, Qwen3MoeConfig  # noqa: E402

from grpo_dist.config.schema import LoraConfig, ModelConfig  # noqa: E402
from grpo_dist.model import attention  # noqa: E402
from grpo_dist.model.load import make_policy  # noqa: E402
from grpo_dist.model.rollout_weights import RolloutModel  # noqa: E402
from grpo_dist.rollout.engine import Request  # noqa: E402
from grpo_dist.rollout.local import LoadedModel, LocalEngine  # noqa: E402
from grpo_dist.rollout.native import gpu, steps  # noqa: E402
from grpo_dist.rollout.native.engine import NativeDecoder  # noqa: E402
from grpo_dist.rollout.native.fused import FusedStep  # noqa: E402
from grpo_dist.rollout.native.steps import module_step  # noqa: E402
from grpo_dist.rollout.room import PAGE, fitting  # noqa: E402
from grpo_dist.rollout.sampling import Sampling  # noqa: E402

LAYERS = 28


def make_model(num_layers: int, adapters: bool = True, config_of: Any = Qwen2Config) -> Any:
    """The model of a policy, as rollouts have it."""
    return policy_of(num_layers, adapters, config_of).causal_lm.eval()


def policy_of(num_layers: int, adapters: bool = True, config_of: Any = Qwen2Config) -> Any:
    """A policy with adapters on every linear layer of the blocks, on the device."""
    config = config_of(
        vocab_size=64, pad_token_id=0, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    return make_policy(base, ModelConfig(name="none"), LoraConfig() if adapters else None).to(CUDA)


def requests_of(groups: int, members: int, prompt: int, limits: list[int] | None = None) -> list[Request]:
    """Completions that end by their length alone."""
    return [Request(group, n, [5] * prompt, key=group * members + n, ignore_end=True,
                    max_new_tokens=limits[group * members + n] if limits else None)
            for group in range(groups) for n in range(members)]  # fmt: skip


def of_a_step(model: Any, rows: int, sampling: Sampling, step_of: Any = FusedStep) -> dict[str, int]:
    """Kernels of a step of so many rows, of two prompts."""
    engine = NativeDecoder([2], 200, 1 << 20, step_of=step_of, captures=False)
    decoding = gpu.DecodingOverPages(engine, model, deque(requests_of(2, rows // 2, 70)), sampling)
    work = decoding.run()
    next(work)
    SEEN.kernels = 0
    LAUNCHED.clear()
    decoding.advance(decoding.computed, decoding.tiles)
    return {"all": SEEN.kernels, **LAUNCHED}


def of_steps(
    rows: int, sampling: Sampling = Sampling(), adapters: bool = True, config_of: Any = Qwen2Config,  # noqa: B008
    step_of: Any = FusedStep, mode: Any = torch.inference_mode,
) -> int:  # fmt: skip
    """Kernels of a step with LAYERS layers."""
    models = [make_model(count, adapters, config_of) for count in (1, 2)]
    with mode():
        some, more = (of_a_step(model, rows, sampling, step_of)["all"] for model in models)
    return some + (LAYERS - 1) * (more - some)


class Reading:
    """A step without a model, which counts the slots that its rows read, and those of the living."""

    def __init__(self, _: Any) -> None:
        self.steps = self.read = self.held = 0
        READINGS.append(self)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, pool: Any) -> torch.Tensor:
        """Logits of one token."""
        self.steps += 1
        rows = pool.num_rows
        alive = DECODING[-1].alive[:rows]
        own = pool.lengths[:rows] + 1
        tiles = pool.tile_prompt[: pool.num_tiles]
        self.read += int(own.sum() + pool.prompt_lengths[tiles[tiles >= 0].long()].sum())
        prompts = pool.prompt[:rows][alive].unique()
        self.held += int(own[alive].sum() + pool.prompt_lengths[prompts].sum())
        return torch.zeros((rows, 1))


READINGS: list[Reading] = []
DECODING: list[Any] = []


class Parameter(torch.nn.Module):
    """A model of nothing, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def begin_step(pool: Any, num_rows: int, num_tiles: int) -> None:
    """What a step without attention has to know."""
    pool.num_rows, pool.num_tiles = num_rows, num_tiles


def prefill(_: Any, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
    """What a prefill gives of prompts that nobody attends to."""
    return types.SimpleNamespace(lengths=[len(prompt) for prompt in prompts]), torch.zeros((len(prompts), 1))


def read_by(requests: list[Request], most: int, tokens: int) -> dict[str, Any]:
    with (
        patch.object(gpu, "prefill", prefill),
        patch.object(gpu.PagePool, "store", lambda *_: None),
        patch.object(gpu.PagePool, "begin_step", begin_step),
        torch.inference_mode(),
    ):
        engine = NativeDecoder([2], most, tokens, step_of=Reading, captures=False)
        unlimited = deque(replace(request, max_new_tokens=None) for request in requests)
        first = gpu.DecodingOverPages(engine, Parameter(), unlimited, Sampling())
        first._take()
        first._admit()
        decoding = gpu.DecodingOverPages(engine, Parameter(), deque(requests), Sampling())
        DECODING.append(decoding)
        lengths = {(each.group, each.sample): len(each.ids) for ended in decoding.run() for each in ended}
    seen = READINGS[-1]
    limits = {(each.group, each.sample): each.max_new_tokens or most for each in requests}
    return {"at once": len(first.rows), "steps": seen.steps, "ratio": seen.read / seen.held, "right": lengths == limits,
            "leaked": decoding.pool.num_pages - len(set(decoding.pool.free))}  # fmt: skip


def of_memory() -> dict[str, Any]:
    """What is left of a rollout's pool and graphs when the allocator gives back what it keeps, without the help of a
    collection; and on how many streams steps were captured."""
    pools, left, streams = [], [], []
    plain = gpu.PagePool.__init__

    def watched(pool: Any, *args: Any) -> None:
        plain(pool, *args)
        pools.append(weakref.ref(pool))

    gpu.PagePool.__init__ = watched
    plain_stream = torch.cuda.Stream
    torch.cuda.Stream = lambda: streams.append(plain_stream()) or streams[-1]  # type: ignore
    torch.cuda.empty_cache = lambda: left.append(sum(pool() is not None for pool in pools))
    engine = LocalEngine(NativeDecoder([2], 40, 1 << 20, step_of=FusedStep, pages=True), LoadedModel(make_model(1)), {})
    gc.collect()
    gc.disable()
    replays = SEEN.replays
    for ends_early in (False, True):
        engine.wake()
        engine.submit(requests_of(2, 4, 70), Sampling())
        answered = 0
        while answered < (1 if ends_early else 8):
            answered += len(engine.poll())
            if ends_early:
                break
        engine.sleep()
    gc.enable()
    return {"pools": len(pools), "left": left, "streams": len(streams), "replays": SEEN.replays - replays}


def first_logits() -> str:
    """The dtype of the logits that first tokens are drawn from, of a policy in bfloat16."""
    with torch.inference_mode(), RolloutModel(policy_of(1), torch.bfloat16, attention.NAME).open() as model:
        return str(steps.prefill(model, [[5, 6, 7]])[1].dtype)


def of_experts() -> dict[str, int]:
    """Kernels of steps whose feed-forward parts are experts, 2 of 4 for a token, by transformers' grouped products."""
    torch.histc = lambda x, bins, min, max: histc(x, bins)  # type: ignore[assignment]
    options = {"head_dim": 16, "num_experts_per_tok": 2}
    configs = {
        "qwen3_moe": partial(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=16, **options),
        "gpt_oss": partial(GptOssConfig, num_local_experts=4, **options),
    }
    # in inference mode the simulated device has no view of a parameter
    return {name: of_steps(512, config_of=config_of, mode=torch.no_grad) for name, config_of in configs.items()}


def main() -> None:
    """Count everything that the fused steps do; with the word `modules` what the modules' own steps do, and with
    `experts` what the steps of mixtures of experts do."""
    normal = random.Random(0)
    lengths = [min(512, max(1, round(normal.gauss(300, 100)))) for _ in range(32)]
    # 80 GB, Qwen2.5-1.5B: what is left beside weights in 16 bits, adapters, and a tenth
    free = int(0.9 * 80e9) - 2 * 1_600_000_000 - 16 * 20_000_000
    tokens = fitting(free, 28 * 2 * 2 * 128 * 2, 151_936 * 24, 1024)
    if sys.argv[1:] == ["modules"]:
        print(json.dumps({"gemma's modules": of_steps(512, config_of=Gemma2Config, step_of=module_step)}))
        return
    if sys.argv[1:] == ["experts"]:
        print(json.dumps(of_experts()))
        return
    print(json.dumps({
        "many rows": of_steps(512), "few rows": of_steps(8), "top-p": of_steps(512, Sampling(top_p=0.95)),
        "without adapters": of_steps(512, adapters=False), "page": PAGE,
        "gemma": of_steps(512, config_of=Gemma2Config),
        "full": read_by(requests_of(32, 16, 256, [9] * 512), 1024, tokens),
        "normal": read_by(requests_of(2, 16, 256, lengths), 512, tokens),
        "memory": of_memory(), "first logits": first_logits(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
