"""Does a test fail for every small change of the pure modules? Changes them one at a time, and runs their tests.

    python tests/mutate.py                        # all of MODULES: an hour on one core
    python tests/mutate.py algorithm/losses             # some of them
    python tests/mutate.py model/packing --line 152    # one line

A change swaps an operator, a comparison, a constant, the arguments of a choice or the truth of a condition. Survivors
are printed as they are found, as `module:line: before -> after`; those that change nothing that can be seen are listed
in EQUIVALENT. The exit status is 1 where others survive. Files are changed in a copy, so that this runs beside other
work.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
import hypothesis.strategies  # noqa: F401 imported once, for all the processes that are forked
import jsonargparse  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
from mutation import mutants, survivors

ROOT = Path(__file__).parents[1]
MODULES = {
    "algorithm/advantages": ["advantages", "targets"],
    "algorithm/losses": ["losses", "trl_equality"],
    "algorithm/kl": ["losses", "targets"],
    "algorithm/ratios": ["targets", "losses"],
    "algorithm/schedule": ["schedule"],
    "algorithm/estimates": ["estimates"],
    "model/packing": ["packing"],
    "types": ["batch", "gathering"],
    "model/attention": ["attention"],
    "model/block_attention": ["attention"],
    "model/layout": ["attention"],
    "model/logprobs": ["logprobs"],
    "rollout/sampling": ["sampling", "stop_strings"],
    "algorithm/hashing": ["sampling", "dropout"],
    "model/dropout": ["dropout"],
    "model/lora": ["lora", "dropout"],
    "model/decoder_layers": ["decoder_layers"],
    "model/decoder_kernels": ["decoder_layers"],
    "algorithm/targets": ["targets", "presets"],
    "monitoring/contrast": ["console"],
    "trainer/gathering": ["gathering"],
    "trainer/update_metrics": ["update_metrics"],
    "rollout/episodes": ["scripted_episodes", "episodes", "replay"],
    "model/routing": ["routing", "replay"],
    "rollout/replay": ["replay"],
    "rollout/native/routes": ["replay"],
    "model/expert_adapters": ["expert_adapters"],
    "planning/memory": ["memory"],
    "planning/advice": ["advice"],
    "trainer/first_update": ["first_update"],
}
"""Modules of the package, and the files `test_NAME.py` of tests/unit that say what they do."""
ROUTES_ROOM = "self.drawn = nothing.new_zeros((0, most + 1, *self.routers.shape))  # (N, most + 1, J, K)"
ROUTES_GIVEN = "batch.routes is not None and batch.prompt_routes is not None"
FLOAT32_PRODUCT, ROUNDED_PRODUCT = "summed_over_rows(x, y)", "(x.T @ y).to(dtype)"
EQUIVALENT = {
    # lines of a GPU
    "model/attention": [
        "if options.softcap is not None and query.is_cuda:",
        "block = GPU_BLOCK if",
        "self.longest = max(prompt + max(completions, default=0) for prompt, completions in pieces): 0 -> 1",
    ],
    # how much is computed at once; a repetition by 1; tensors of 4 dimensions
    "model/block_attention": [
        "BLOCK, GPU_BLOCK =",
        "repeat > 1 -> repeat >= 1",
        "products = query @ key.transpose(-2, -1): -2 -> 2",
        "attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(): -2 -> 2",
        "attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(): 2 -> 3",
        "return scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value: -2 -> 2",
    ],
    # a window as long as the row
    "model/layout": ["self.window >= longest -> self.window > longest"],
    # what is a rounding, to the bit and to a factor of 2; the loop has the same result as what spares it
    "algorithm/advantages": [
        "stds > 1e-12 * means.abs().clamp(min=1) -> stds >= 1e-12 * means.abs().clamp(min=1)",
        "return stds > 1e-12 * means.abs().clamp(min=1): 1 -> 2",
        "if discount == 1 and values.count_nonzero() == last.count_nonzero():: 1 -> 2",
    ],
    # how much is computed at once; the lines of a GPU, which tests/gpu runs; torch gives the same; a chunk is
    # dropped afterwards, and who keeps it says so; the two are None together; of the ones, as many are taken as there
    # are targets
    "model/logprobs": [
        "CHUNK_ELEMENTS =",
        "if hidden.is_cuda and",
        "return logits if bias is None else",
        "if logits.is_cuda and",
        "return score_rows(",
        "if pack_kernels.fits(logits, multiple=1):",
        "logits: Tensor, targets: Tensor, temperature: float, slope_dtype:",
        "return *pack_kernels.score_rows(logits, targets.contiguous(), temperature, slopes=False), None",
        "direction is not None and slopes is not None -> direction is not None or slopes is not None",
        "slopes = probs.neg_().scatter_add_(",
        "-1 -> 1",
        "3 -> 4",
    ],
    # the balance alone; any number above `most`; how many numbers of packs are tried; loads are only compared; what is
    # copied to a GPU, which tests/gpu does; the smallest int64 is its own opposite; the two are None together
    "model/packing": [
        "bounds = segments(self.layout.pieces) if self.layout and device.type ==",
        "one + FILLER -> one - FILLER",
        f"{ROUTES_GIVEN} -> {ROUTES_GIVEN.replace('and', 'or')}",
        "PAIRS_PER_TOKEN =",
        "size = most + 1: 1 -> 2",
        "more *= 2  # a few packs too many cost less than trying every number: 2 -> 3",
        "load = [0.0] * num_ranks: 0.0 -> 1.0",
        "load[rank] += 0.0 if number is None else costs[number]: 0.0 -> 1.0",
    ],
    # room that is not used
    "model/decoder_kernels": [
        "scaling: float = 0.0",
        "factors, y = made(2, tokens)",
        "queries // weights.head_size -> queries * weights.head_size",
        "sums = key.new_empty(2",
    ],
    # speed alone; numbers of a trial, and both of its sides; what the trial sees too; a factor of no adapters; what
    # ZeRO-3 gathers, in tests/distributed
    "model/decoder_layers": [
        "MOST_NUMBERS =",
        "outputs * inputs <= MOST_NUMBERS -> outputs * inputs < MOST_NUMBERS",
        "generator = torch.Generator().manual_seed(0)",
        "tokens, hidden, inner, size, heads =",
        "return torch.randn(shape, generator=generator, device=",
        "attended = layout.attend(0,",
        "(given, truth, options), large =",
        "x, norm, mlp_norm = factor *",
        "v, (gate, up, down) = (factor *",
        "torch.allclose(y, exact, 0.0001, 0.0001)",
        "base, scaling, adapters = (layer, 0.0, None)",
        "for each in part._parameters.values() if each is not None",
    ],
    # what is rounded otherwise on a GPU alone, and its lines; all adapters of a layer have one dtype, and the layers of
    # a family one scale
    "model/lora": [
        "return x.is_cuda -> return None",
        "ctx.dtypes, ctx.scaling = (adapters[0].dtype, adapters[count].dtype), scaling: 0 -> 1",
        "grad_a = _divided(_of_adapter(grad_low, x if kept is None else x * kept, ctx.dtypes[0]), ranks, 0): 0 -> 1",
        "(y,) = _computed(self.layers, x, self.name, self.layers[0].scaling[self.name], has_gate=True): 0 -> 1",
        "return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scaling)",
        f"{FLOAT32_PRODUCT} if dtype == torch.float32 else {ROUNDED_PRODUCT} -> "
        f"{ROUNDED_PRODUCT} if dtype == torch.float32 else {FLOAT32_PRODUCT}",
        "dtype == torch.float32 -> dtype != torch.float32",
    ],
    # at 0 nothing is pushed; a group more, which is empty, counts for nothing
    "algorithm/losses": ["temperature = torch.where(advantages > 0, ", "num_groups = int(group.max()) + 1 if len("],
    # with one step left to go down in, none of it has passed
    "algorithm/schedule": ["progress = max(0.0, step - decay_from) / max(1, num_steps - decay_from): 1 -> 2"],
    # torch takes numbers modulo 2^64; more words than are needed are cut off
    "algorithm/hashing": ["1 << 64 -> 1 >> 64", "-count // 4 -> -count * 4"],
    # of a row that was not drawn; int16 takes the bound modulo 2^16
    "model/dropout": ["0 -> 1", "self.levels - LEVELS // 2 -> self.levels + LEVELS // 2"],
    # how much is drawn, from which seed; a sum that is off by exactly 1e-12; the first of two
    "algorithm/estimates": [
        "_RESAMPLES =",
        "_SIGN_FLIPS =",
        "_SEED =",
        "as_far += abs(",
        "winner = votes.most_common(",
    ],
    # more room than is used
    "rollout/native/routes": [f"{ROUTES_ROOM}: {change}" for change in ("0 -> 1", "1 -> 2", "most + 1 -> most - 1")],
    # what no call has filled yet; tensors of 2 dimensions, or of 2 after the first reduction
    "model/routing": [
        "self.chosen: list[Tensor] = [torch.zeros(0)]",
        "return (own == given).all(-1).float().mean(-1): -1 -> 1",
        "if scores.shape[1:] != (self.num_experts,) or top.indices.shape[-1] != self.experts_of_a_token:: -1 -> 1",
        "return torch.return_types.topk((scores.gather(-1, indices), indices)): -1 -> 1",
    ],
    # a function that dispatches inside one that does, and is asked only whether it has the name; older releases of PEFT
    "model/expert_adapters": [
        "dispatching.knows_matrices = True",
        "if plain is linear or hasattr(",
        'return (b, a) if getattr(layer, "_did_swap_in_out_features", False) else (a.mT, b.mT): False -> True',
    ],
    # set before they are read
    "rollout/episodes": ["is_open: bool =", "asked_at: float ="],
    # any number below 0; sorting on a CPU is stable anyway; of the zeros behind the last, the first is taken
    "types": [
        "number = torch.full(",
        "numbers, order = ",
        "return torch.cat([self.advantages, self.advantages.new_zeros(1)])[first]: 1 -> 2",
    ],
    "rollout/sampling": [
        "UNITS =",
        "BLOCK = 128",
        "-1 -> 1",
        "size % BLOCK -> size * BLOCK",
        "running.shape[-1] - 1 -> running.shape[-1] + 1",
    ],  # sums of so many; 2 dimensions; pads by 0; a bound that only logits which are NaN go beyond
    # without a trace nobody reads what was seen; ones of any shape; a trace's two numbers become known together, and an
    # update has the names of the others
    "trainer/update_metrics": [
        "if self.trace is not None and len(inside)",
        "self.seen[rows] = torch.stack(",
        "new = (seen[:, 2] > 0) & self.trace[:, 0].isnan(): 0 -> 1",
        "return step | ({agreement",
    ],
    # what others subtract, and count by; what is read only where it was given
    "planning/memory": ["RESERVE =", "PERSISTENCE_THRESHOLD =", "scale_bytes: int =", "prefilled: int ="],
    "planning/advice": ["for _ in range(16):"],  # more than there are changes
    # how much is shown, and how wide; any number below 0; of equal rewards two completions already come in order
    "monitoring/contrast": [
        "_PROMPT_CHARACTERS =",
        "_TEXT_CHARACTERS =",
        "table = Table(",
        "table.add_column(",
        "1.0 -> 2.0",
        "order = batch.reward",
    ],
}
"""Changes that no test can see, by module: as `before -> after`, as `line: before -> after`, or all those of lines that
begin so."""


def is_equivalent(name: str, code: str, change: str) -> bool:
    """Whether the table names this change of a line."""
    listed = tuple(EQUIVALENT.get(name, ()))
    return code.startswith(listed) or not {change, f"{code}: {change}"}.isdisjoint(listed)


def tell(output: int, name: str, text: str) -> None:
    """Print a line at once, from whichever fork."""
    os.write(output, f"{name}:{text}\n".encode())


def main() -> int:
    """Print survivors and the share that died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--line", type=int, help="only changes of this line")
    parser.add_argument("--seconds", type=float, default=300, help="after which a run counts as failed")
    options = parser.parse_args()
    num_changes = num_survivors = 0
    output = os.dup(1)  # forks print nothing else
    gc.freeze()
    with tempfile.TemporaryDirectory() as directory:
        copy_of = Path(directory)
        for name in ("grpo_dist", "tests", "configs", "setup.cfg", "pyproject.toml"):
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy_of / name)
        compileall.compile_dir(copy_of / "grpo_dist", quiet=1)  # what is not changed is compiled once
        for name in options.modules:
            module = copy_of / "grpo_dist" / f"{name}.py"
            source = module.read_text()
            lines = source.splitlines()
            tried = [each for each in mutants(source)
                     if options.line in (None, each.line)
                     and not is_equivalent(name, lines[each.line - 1].strip(), each.change)]  # fmt: skip
            tests = [str(path.relative_to(copy_of)) for test in MODULES[name]
                     for path in copy_of.glob(f"tests/unit/**/test_{test}.py")]  # fmt: skip
            try:
                survived = survivors(copy_of, module, tried, tests, options.seconds, partial(tell, output, name))
            except RuntimeError as error:
                raise SystemExit(f"{name}: {error}") from error
            print(f"{name}: {len(tried) - len(survived)} of {len(tried)} changes were seen by a test", flush=True)
            num_changes, num_survivors = num_changes + len(tried), num_survivors + len(survived)
    gc.unfreeze()  # Triton would report what is frozen as leaks
    print(f"{num_changes - num_survivors} of {num_changes} changes were seen by a test")
    return int(num_survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
