"""The messages of a vLLM server: what is asked of /v1/completions, and what a right answer is. Pure."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...algorithm.hashing import stream_key
from ...model.routing import Routers
from ...types import no_routes
from ..engine import PLAIN, Request, limit_of
from ..sampling import Sampling

COMPLETIONS = "/v1/completions"
ROUTES = "--enable-return-routed-experts"
"""The argument of a server that reports the experts of each token."""
_NO_PROBABILITY = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""
_BAN = -100.0
"""The lowest bias of a logit that vLLM takes."""


@dataclass(frozen=True)
class Answer:
    """What a server sampled for a request."""

    ids: list[int]
    logprobs: list[float]
    """Of each of `ids` (nats)."""
    prompt_logprobs: list[float]
    """Of each token of the prompt but the first, where they were asked for."""
    routes: Tensor | None = None
    """(tokens of the prompt and of `ids`, J, K): the experts that each took, where they are to be replayed."""


def completion_message(
    model: str, request: Request, sampling: Sampling, end_ids: list[int], most: int, *, scores_prompt: bool = False
) -> dict[str, Any]:
    """The message that asks for one trajectory of at most `most` tokens.

    Every option of sampling is given: servers take those that are missing from the model's generation_config.json.
    """
    message: dict[str, Any] = {
        "model": model, "prompt": request.prompt, "max_tokens": limit_of(request, most),
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p, "top_k": 0 if sampling.greedy else sampling.top_k,
        "min_p": 0.0 if sampling.greedy else sampling.min_p,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "seed": seed_of(request), "logprobs": 0, "return_token_ids": True,
        # the ids that end a completion are the trainer's, whatever the server takes from the model's files
        "ignore_eos": True, "stop_token_ids": [] if request.ignore_end else end_ids,
        "min_tokens": min(max(0, sampling.min_new_tokens - request.offset), limit_of(request, most)),
        "stop": [*sampling.stop.strings] if sampling.stop and not request.ignore_end else [],
        # a stop string may be a special token
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    if sampling.banned:
        message["logit_bias"] = {str(token): _BAN for token in sampling.banned}
    return message | {"prompt_logprobs": 0} if scores_prompt else message


def seed_of(request: Request) -> int:
    """The seed of a request: a function of its noise, which is one of (seed, step, prompt, sample), and of its place in
    the trajectory; from 0 to 2**63 - 1, since servers take -1 for no seed."""
    return (stream_key(request.key, request.offset) if request.offset else request.key) & (2**63 - 1)


def read_answer(
    content: Any, message: dict[str, Any], sampling: Sampling = PLAIN, offset: int = 0, routers: Routers | None = None
) -> Answer:
    """The answer to a message, which asked for `sampling` after `offset` tokens of the trajectory; `routers` are
    those that take the experts which the server took.

    Raises LookupError, TypeError or ValueError for anything but a complete right one.
    """
    if content["model"] != message["model"]:
        raise ValueError(f"it is of the model {content['model']!r}, expected {message['model']!r}")
    (choice,) = content["choices"]
    if choice["prompt_token_ids"] != message["prompt"]:
        raise ValueError("it is for another prompt")
    ids, reason, most = [int(token) for token in choice["token_ids"]], choice["finish_reason"], message["max_tokens"]
    logprobs = [_logprob(value) for value in choice["logprobs"]["token_logprobs"]]
    if len(ids) != len(logprobs):
        raise ValueError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
    if banned := {*ids}.intersection(sampling.banned):
        raise ValueError(f"tokens that are banned: {sorted(banned)}")
    stopped_at = sampling.stopped_at(ids, offset) if message["stop"] else None
    ended = stopped_at is not None or (bool(ids) and ids[-1] in message["stop_token_ids"])
    if not (1 <= len(ids) <= most and {"stop": ended, "length": len(ids) == most}.get(reason, False)):
        raise ValueError(f"{len(ids)} tokens that ended by {reason!r}, expected an end token, a stop string or {most} "
                         "tokens")  # fmt: skip
    # a server may look at the text after several tokens
    ids, logprobs = ids[:stopped_at], logprobs[:stopped_at]
    routes = None if routers is None else _routes(choice, message, len(ids), routers)
    return Answer(ids, logprobs, _prompt_logprobs(choice, message) if "prompt_logprobs" in message else [], routes)


def read_models(content: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a server lists: its model, and the adapters that are loaded. Raises as `read_answer`, and AttributeError."""
    listed = list(content["data"])
    adapters = [each for each in listed if each.get("parent")]
    base = next((each for each in listed if each not in adapters), None)
    if base is None or not isinstance(base["id"], str):
        raise ValueError("it serves no model")
    return base, adapters


def one_token(model: str, stop: Sequence[str]) -> dict[str, Any]:
    """The message that asks for any token, to see what else an answer has, and whether so many stop texts are taken."""
    return {"model": model, "prompt": [0], "max_tokens": 1, "stop": [*stop]}


def reports_routes(content: Any) -> bool:
    """Whether a server's answer has the experts that tokens took."""
    return content["choices"][0].get("routed_experts") is not None


def without_routes(url: str) -> str:
    """The message about a server that does not report experts."""
    return (f"rollout.routing_replay: {url} does not report the experts that tokens took. Expected a server that is "
            f"started with {ROUTES}, or rollout.routing_replay: false")  # fmt: skip


def _routes(choice: Any, message: dict[str, Any], kept: int, routers: Routers) -> Tensor:
    """(tokens of the prompt and `kept` new ones, J, K). vLLM reports every token that it has computed, those of cached
    prefixes too, in every layer; of layers without experts, zeros. The last token was drawn and not computed."""
    file = io.BytesIO(base64.b64decode(choice["routed_experts"], validate=True))
    table = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.int64))
    prompt, layers, width = len(message["prompt"]), max(routers.layers) + 1, routers.experts_of_a_token
    computed = prompt + len(choice["token_ids"]) - 1
    if table.ndim != 3 or len(table) != computed or table.shape[1] < layers or table.shape[2] != width:
        raise ValueError(f"experts of the shape {tuple(table.shape)}, expected ({computed}, {layers}, {width})")
    taken = table[: prompt + kept - 1, routers.layers]
    if not 0 <= int(taken.min()) <= int(taken.max()) < routers.num_experts:
        raise ValueError(f"the experts {int(taken.min())} to {int(taken.max())} of {routers.num_experts}")
    return torch.cat([taken.to(routers.dtype), no_routes(1, like=taken.to(routers.dtype))])


def _prompt_logprobs(choice: Any, message: dict[str, Any]) -> list[float]:
    _, *rows = choice["prompt_logprobs"]
    values = [float(row[str(token)]["logprob"]) for row, token in zip(rows, message["prompt"][1:], strict=True)]
    if not all(map(math.isfinite, values)):
        raise ValueError("log-probabilities of the prompt that are not finite")
    return values


def _logprob(value: Any) -> float:
    return -math.inf if float(value) <= _NO_PROBABILITY else float(value)
