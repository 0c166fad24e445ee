"""The decoding step of `decode.cpp`: models built as Llama is, on a CPU.

torch's operations for a few tokens spend as long on starting as on computing, and a product of few rows waits for
memory. Here a step is one call, and what it computes for a sequence does not depend, to the last bit, on what else is
in flight. Where it cannot be compiled `llama.py` takes its place.

Shapes: R sequences, V vocabulary, H hidden, F intermediate, D head size.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...config.schema import Config
from ...distributed.device import cpu_multiplies_bfloat16
from ...model.compiled.library import HIGH_BLOCK, library
from ...model.quantized import QuantizedWeight
from ...types import integers
from ..sampling import Rules, Sampling, draw
from .cache import EVERYTHING, DecodeState, PrefilledRows
from .drawn_steps import DrawnSteps
from .llama import Gated, Layer, Linear, LlamaWeights, Norm, takes_gelu
from .relaid import MOST_SPARE_BYTES, Compact, CompactWeight, CompactWeights, RelaidWeights
from .structures import DrawingFields, LayerFields, LinearFields, StepFields, address_of

if TYPE_CHECKING:
    from .engine import Decoding

SOURCE = Path(__file__).with_name("decode.cpp")
FUNCTIONS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
"""The function for weights of each dtype; it computes in float32, but for the inputs of products of bfloat16."""
MERGED = {torch.float32}
"""The dtypes of weights to which adapters are added beforehand. In others that would round most of a small update away,
and to a quantised weight nothing can be added: there the adapters stay apart, and what they make of the inputs is added
to the sums in float32."""
FEW_SEQUENCES = 16
"""Most sequences of a step, over all ranks, with which weights that bfloat16 holds exactly are also kept in 12 bits a
number: few rows wait for memory, and then read 3/8 or 3/4 as much. With more sequences, adapters that are apart from
float32 weights cost more than that saves."""
ENTERED_AT_ONCE = 256
"""Most tokens that enter the cache in one pass: what is computed of more leaves the processor's caches."""
LONGEST_ENTERED = 1024
"""Tokens of the longest prompt that is computed here: over more of them torch's attention is faster. Where neither
torch nor this file has products of bfloat16, torch is never faster, and where torch alone has them it always is."""
MULTIPLE = 8
"""Sizes have to be multiples of this: so many numbers, or twice as many, are computed at once."""


class KernelStep:
    """One more token of every sequence; it holds on to the weights that the model has when this is made."""

    def __init__(self, model: nn.Module, *, compact: CompactWeights | None = None) -> None:
        """`compact`: hold weights that bfloat16 holds exactly in a form for few rows too, and adapters apart from them.

        Raises as `LlamaWeights`, and ValueError for sizes this does not compute or where it cannot be compiled.
        """
        self.weights = weights = LlamaWeights(model)
        first, size, self.dtype = weights.layers[0], weights.head_size, weights.embeddings.dtype
        self.gated = [_gated(layer) for layer in weights.layers]
        (vocabulary, hidden), inner = weights.embeddings.shape, self.gated[0].gate.outputs
        if self.dtype not in FUNCTIONS or any(number % MULTIPLE for number in (hidden, inner, size)):
            raise ValueError(f"{self.dtype} with sizes {hidden}, {inner} and {size}, expected one of {list(FUNCTIONS)} "
                             f"with multiples of {MULTIPLE}")  # fmt: skip
        _check_layers(weights)
        code = library(SOURCE)
        self.decode, self.scratch_floats = getattr(code, FUNCTIONS[self.dtype]), code.scratch_floats
        self.draw_rows = code.draw_rows
        self.draw_rows.argtypes = [c_int64, c_void_p, c_int64, c_int64, c_float, *[c_void_p] * 4]
        self.scratch_floats.restype = c_int64
        code.multiplies_pairs.restype = c_int64
        numbers = vocabulary * hidden + len(weights.layers) * hidden * (
            2 * (first.query.outputs + first.key.outputs) + 3 * inner
        )
        self.compact, self.relaid = compact if most_compact_bytes(numbers, self.dtype) else None, RelaidWeights()
        self.referenced: list[Tensor | CompactWeight] = []  # what is pointed to
        self.step = step = StepFields(
            torch.get_num_threads(), len(weights.layers), hidden, inner, vocabulary,
            first.query.outputs // size, first.key.outputs // size, size, 0,
            takes_gelu(self.gated), weights.norm.eps, first.attention.scale, first.attention.softcap or 0.0,
            weights.embedding_scale, weights.logit_cap or 0.0,
            self._kept(weights.embeddings, (vocabulary, hidden), self.dtype), self._norm(weights.norm, hidden),
        )  # fmt: skip
        self.multiplies_pairs = self.dtype == torch.bfloat16 and bool(code.multiplies_pairs(ctypes.byref(step)))
        self.layers = (LayerFields * len(weights.layers))(*map(self._layer, weights.layers, self.gated))
        step.layer, step.head = ctypes.addressof(self.layers), self._linear(weights.head, vocabulary, hidden)
        step.ranks = self._most_ranks(step.head)
        self.points_into: tuple[DecodeState | None, int] = None, 0
        self.scratch = torch.empty(0)
        multiplies = self.dtype == torch.float32 or self.multiplies_pairs
        self.longest_entered = LONGEST_ENTERED if multiplies else 0 if cpu_multiplies_bfloat16() else EVERYTHING

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return self.step.vocabulary

    def __call__(self, tokens: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        """Logits (R, V) float32 after `tokens` (R,) int64 at `positions` (R,) int64, of the rows that are computed."""
        logits, rows = torch.empty(len(tokens), self.vocabulary), state.computed
        self.run(tokens, positions, state.slots if rows is None else state.slots[rows], rows, state, logits)
        return logits

    def draw(
        self, logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, rules: Rules | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `SeveralTokensStep`; compiled, unless some tokens may not be drawn."""
        if _leaves_out(sampling, rules):
            return draw(logits, keys, positions, sampling, rules)
        logits, (rows, size) = logits.float().contiguous(), logits.shape
        tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self.draw_rows(
            torch.get_num_threads(), address_of(logits, (rows, size), torch.float32), rows, size,
            1 / sampling.temperature, *(address_of(each, (rows,), torch.int64) for each in (keys, positions)),
            tokens.data_ptr(), logprobs.data_ptr(),
        )  # fmt: skip
        return tokens, logprobs

    def enters(self, tokens: int) -> bool:
        """See `SeveralTokensStep`."""
        return tokens <= self.longest_entered

    def prefill(self, prompts: list[list[int]]) -> tuple[PrefilledRows, Tensor]:
        """See `SeveralTokensStep`; logits are float32."""
        lengths, step = [len(prompt) for prompt in prompts], self.step
        shape = len(prompts), step.key_heads, max(lengths), step.head_size
        state = DecodeState.of_rows(shape, [layer.number for layer in self.weights.layers], self.dtype)
        entered = [(token, row, slot) for row, prompt in enumerate(prompts) for slot, token in enumerate(prompt[:-1])]
        tokens, rows, slots = integers(entered).view(-1, 3).T
        self.enter(tokens, rows, slots, state)
        last = [(prompt[-1], row, len(prompt) - 1) for row, prompt in enumerate(prompts)]
        tokens, rows, slots = integers(last).T.contiguous()
        logits = self.several(tokens, rows, slots, state)  # whose keys belong to the prompts, too
        return PrefilledRows(lengths, state.own_keys, state.own_values), logits

    def enter(self, tokens: Tensor, rows: Tensor, slots: Tensor, state: DecodeState) -> None:
        """See `SeveralTokensStep`."""
        for at in range(0, len(tokens), ENTERED_AT_ONCE):
            token, row, slot = (each[at : at + ENTERED_AT_ONCE].contiguous() for each in (tokens, rows, slots))
            self.run(token, _positions(row, slot, state), slot, row, state, None, several=True)

    def several(self, tokens: Tensor, rows: Tensor, slots: Tensor, state: DecodeState) -> Tensor:
        """See `SeveralTokensStep`; logits are float32."""
        logits = torch.empty(len(tokens), self.vocabulary)
        self.run(tokens, _positions(rows, slots, state), slots, rows, state, logits, several=True)
        return logits

    def together(self, decoding: Decoding) -> DrawnSteps | None:
        """See `SeveralTokensStep`."""
        sampling, rules = decoding.sampling, decoding.rules
        return None if _leaves_out(sampling, rules) or rules.matches else DrawnSteps(self, decoding)

    def run(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Tensor | None, state: DecodeState,
        logits: Tensor | None, *, several: bool = False, turns: Tensor | None = None,
        drawing: DrawingFields | None = None,
    ) -> None:  # fmt: skip
        """Compute `tokens` that get `slots` of the cache's `rows`, all (T,) int64, to `logits` (T, V) float32.

        None for `rows` are all of them. The n-th token turns as the n-th of `positions` says, or as that of the number
        in `turns` (T,) int64. A `drawing` goes on with what it draws, and changes all these tensors.
        """
        if self.points_into != (state, state.version):
            self._point_into(state)
        step, count = self.step, len(tokens)
        prompt = state.prompt if rows is None else state.prompt[rows]
        rotations = self.weights.rotations(torch.empty(0), positions).values()
        turn = [torch.stack(each) if len(rotations) > 1 else each[0][None] for each in zip(*rotations, strict=True)]
        step.rows, step.several, step.num_turns = count, several, len(positions)
        shape = len(rotations), len(positions), step.head_size
        step.cos, step.sin = (address_of(x, shape, torch.float32) for x in turn)
        step.tokens, step.slots, step.prompt = (address_of(x, (count,), torch.int64) for x in (tokens, slots, prompt))
        step.cache_rows, step.turns = (
            None if x is None else address_of(x, (count,), torch.int64) for x in (rows, turns)
        )
        step.logits = None if logits is None else logits.data_ptr()
        if (needed := self.scratch_floats(ctypes.byref(step))) > len(self.scratch):
            self.scratch = torch.empty(needed)
        step.scratch = self.scratch.data_ptr()
        self.decode(ctypes.byref(step), None if drawing is None else ctypes.byref(drawing))

    def _point_into(self, state: DecodeState) -> None:
        step, number = self.step, self.weights.layers[0].number
        step.own_slots, step.prompt_slots = state.own_keys[number].shape[2], 0
        stores = [("own_keys", state.own_keys, (state.num_rows, step.own_slots)),
                  ("own_values", state.own_values, (state.num_rows, step.own_slots))]  # fmt: skip
        if state.shares:
            prompts, step.prompt_slots = len(state.prompt_lengths), state.prompt_keys[number].shape[2]
            step.prompt_lengths = address_of(state.prompt_lengths, (prompts,), torch.int64)
            stores += [("prompt_keys", state.prompt_keys, (prompts, step.prompt_slots)),
                       ("prompt_values", state.prompt_values, (prompts, step.prompt_slots))]  # fmt: skip
        for place, layer in zip(self.layers, self.weights.layers, strict=True):
            for name, store, (length, slots) in stores:
                shape = length, step.key_heads, slots, step.head_size
                setattr(place, name, address_of(store[layer.number], shape, self.dtype))
        self.points_into = state, state.version

    def _layer(self, layer: Layer, gated: Gated) -> LayerFields:
        weights = self.weights
        hidden, size, first = weights.embeddings.shape[1], weights.head_size, weights.layers[0]
        queries, keys, inner = first.query.outputs, first.key.outputs, self.gated[0].gate.outputs
        sinks, window = layer.attention.sinks, layer.attention.window
        return LayerFields(
            self._norm(layer.input_norm, hidden), self._norm(layer.output_norm, hidden),
            self._norm(layer.mlp_norm, hidden), self._norm(layer.down_norm, hidden),
            self._norm(layer.query_norm, size), self._norm(layer.key_norm, size),
            None if sinks is None else self._kept(sinks.float(), (queries // size,), torch.float32),
            self._linear(layer.query, queries, hidden), self._linear(layer.key, keys, hidden),
            self._linear(layer.value, keys, hidden), self._linear(layer.output, hidden, queries),
            self._linear(gated.gate, inner, hidden), self._linear(gated.up, inner, hidden),
            self._linear(gated.down, hidden, inner), window or EVERYTHING, weights.kinds.index(layer.kind),
        )  # fmt: skip

    def _norm(self, norm: Norm | None, size: int) -> int | None:
        return None if norm is None else self._kept(norm.weight.float(), (size,), torch.float32)

    def _linear(self, linear: Linear, outputs: int, inputs: int) -> LinearFields:
        bias = None if linear.bias is None else self._kept(linear.bias.float(), (outputs,), torch.float32)
        adapter, stored, is_merged = linear.adapter, linear.stored, False
        if isinstance(stored, QuantizedWeight):
            place = self._quantized(stored, outputs, inputs)
        else:
            in_turn = not self.multiplies_pairs
            compact = None if self.compact is None else self.compact.of(stored, in_turn, self.relaid)
            is_merged = adapter is not None and self.dtype in MERGED and compact is None
            weight = linear.merged() if is_merged else stored
            groups = self.relaid.put_groups(weight) if is_merged else None  # in place of the merged one
            place = LinearFields(self._kept(weight if groups is None else groups, (outputs, inputs), self.dtype),
                                 groups is not None)  # fmt: skip
            if compact is not None:
                self.referenced.append(compact)
                place.compact = Compact.of(compact)
        place.bias = bias
        if adapter is None or is_merged:
            return place
        rank = len(adapter.a)
        low, high = (each.to(self.dtype) for each in (adapter.a, adapter.b))  # as the trainer rounds them
        place.low, place.rank = self._kept(low, (rank, inputs), self.dtype), rank
        scaled = pad(high.float() * adapter.scaling, (0, 0, 0, -outputs % HIGH_BLOCK))
        blocks = scaled.view(-1, HIGH_BLOCK, rank).mT.contiguous()
        place.high = self._kept(blocks, blocks.shape, torch.float32)
        return place

    def _quantized(self, stored: QuantizedWeight, outputs: int, inputs: int) -> LinearFields:
        # weights that are computed at once have one scale
        is_divided = stored.block % (2 * MULTIPLE) and stored.block != inputs
        if stored.shape != (outputs, inputs) or stored.dtype != self.dtype or is_divided:
            raise ValueError(f"{stored.dtype} {stored.shape} in blocks of {stored.block}, expected {self.dtype} "
                             f"{(outputs, inputs)} in lines or multiples of {2 * MULTIPLE}")  # fmt: skip
        codes, scales, values = stored.codes, stored.scales, stored.values
        return LinearFields(
            self._kept(codes, codes.shape, torch.int8 if values is None else torch.uint8),
            scales=self._kept(scales, scales.shape, torch.float32), block=stored.block,
            values=None if values is None else self._kept(values, (16,), torch.float32),
        )  # fmt: skip

    def _most_ranks(self, head: LinearFields) -> int:
        """Of adapters that stay apart and read the same input, added up."""
        groups = [[head]]
        for layer in self.layers:
            groups += [[layer.query, layer.key, layer.value], [layer.output], [layer.gate, layer.up], [layer.down]]
        return max(sum(linear.rank for linear in group) for group in groups)

    def _kept(self, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        self.referenced.append(x)
        return address_of(x, shape, dtype)


def most_compact_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Most bytes that compact weights take beside so many numbers of a dtype; 0 where none are made.

    In bfloat16 there are none whose memory is not kept from one rollout to the next: they save a quarter of a step's
    time, and new memory took as long as 200 steps save.
    """
    num_bytes = numbers * torch.bfloat16.itemsize
    return 0 if dtype == torch.bfloat16 and num_bytes > MOST_SPARE_BYTES else num_bytes


def has_few_sequences(config: Config) -> bool:
    """Whether a step has at most FEW_SEQUENCES, whatever the number of ranks."""
    return config.train.batch_size * config.rollout.group_size <= FEW_SEQUENCES


def _leaves_out(sampling: Sampling, rules: Rules | None) -> bool:
    """Whether some tokens may not be drawn, which only torch's operations know."""
    return sampling.greedy or sampling.truncates or (rules is not None and rules.bans)


def _positions(rows: Tensor, slots: Tensor, state: DecodeState) -> Tensor:
    """Positions of tokens that get `slots` of the cache."""
    return state.prompt_lengths[state.prompt[rows]] + slots - state.starts[rows]


def _gated(layer: Layer) -> Gated:
    if isinstance(layer.feed_forward, Gated):
        return layer.feed_forward
    raise ValueError(f"{type(layer.feed_forward).__name__} is no feed-forward part with one gate")


def _check_layers(weights: LlamaWeights) -> None:
    """Raise ValueError where layers differ in what the kernel takes for all of them."""
    norms = [norm for layer in weights.layers for norm in (layer.input_norm, layer.output_norm, layer.mlp_norm,
             layer.down_norm, layer.query_norm, layer.key_norm) if norm is not None]  # fmt: skip
    if {norm.eps for norm in norms} != {weights.norm.eps}:
        raise ValueError("layers differ in the eps of their norms")
    if len({(layer.attention.scale, layer.attention.softcap) for layer in weights.layers}) > 1:
        raise ValueError("layers differ in the scale or the soft cap of their scores")
