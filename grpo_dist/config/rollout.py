"""Options of rollouts: what completions look like, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import require
from .vllm import VllmConfig

TokensInFlight = int | Literal["auto"]
RoutingReplay = bool | Literal["auto"]

NO_ROUTES = {"paged": "does not report the experts of a token"}
"""Engines that cannot serve routing replay, and why."""
MOST_STOP_CHARACTERS = 1000
"""The table that finds stop texts has a row for each of their characters."""


def truncates(top_p: float, top_k: int, min_p: float) -> bool:
    """Whether these leave tokens out of a distribution."""
    return top_p < 1 or top_k > 0 or min_p > 0


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    group_size: int = 8
    """Completions per prompt."""
    max_completion_length: int = 256
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities of policy and reference are taken at the same temperature."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 turns it off."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 turns it off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability; 0 turns it off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion, such as `[</answer>]`, besides its end-of-sequence tokens. The token that completes
    one is the last: it is trained on, rewards see the text with all of it, and the completion counts as finished. With
    an environment, a turn ends so."""
    min_new_tokens: int = 0
    """So many tokens of a completion do not end it: end tokens are not drawn, and stop texts do not count."""
    banned_tokens: list[str | int] = field(default_factory=list)
    """Tokens that are never drawn: ids, or texts of one token each. As with top_p, log-probabilities are those of all
    tokens."""
    max_resamples: int = 0
    """Dynamic sampling: groups of further prompts replace groups whose rewards are all equal, in at most this many
    rounds a step. If too few are there after the last round, the rest are groups that were to be replaced."""
    max_tokens_in_flight: TokensInFlight = "auto"
    """Most tokens (prompts and completions) with keys and values in a rank's memory at once; further prompts wait.
    `auto` is what fits into a GPU's free memory, and 262144 on a CPU. If memory still runs out, half as many are
    decoded at once. The completions are the same."""
    engine: Literal["auto", "native", "paged", "vllm"] = "auto"
    """The engine that decodes: `native`, this project's own; `paged`, transformers' continuous batching with this
    project's sampling; `auto`, the faster one of a trial at the start on a GPU, else `native`. All three draw the same
    completions. `vllm`: vLLM servers, whose sampling is their own (docs/vllm.md)."""
    dequantize: bool = True
    """Where decoding does not compute with the codes of a quantised base, as it does in C++ on a CPU: decode with a
    dequantised copy, which exists during rollouts only. false decodes without a copy there, too: several times slower,
    without its memory."""
    drafts: bool = True
    """Draw several tokens of a completion in one pass where other completions of its prompt, of the same step or of
    earlier epochs, show what probably comes next, and where that is faster. The completions are the same, to the last
    bit. For models that decode in C++ on a CPU (docs/architecture.md); others draw without drafts."""
    routing_replay: RoutingReplay = "auto"
    """For a mixture of experts: reference and update take the experts that each token took in the rollout, weighted by
    their own routers (docs/experts.md). `auto` does so where the model and the engine can; true refuses others."""
    lag: int = 0
    """Steps by which the policy that draws a batch is behind the one that begins to train on it. 0 draws with the
    newest policy. 1 draws the next step's batch before this step's update."""
    vllm: VllmConfig | None = None
    """The servers of engine `vllm`."""

    def __post_init__(self) -> None:
        require(self.group_size >= 1, "rollout.group_size", self.group_size, "at least 1")
        require(self.max_completion_length >= 1, "rollout.max_completion_length", self.max_completion_length,
                "at least 1 token")  # fmt: skip
        require(self.temperature > 0, "rollout.temperature", self.temperature, "above 0 (evaluations also go greedily)")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "a share in (0, 1]")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "0 (off) or more")
        require(0 <= self.min_p < 1, "rollout.min_p", self.min_p, "a share in [0, 1)")
        reports = self.engine not in NO_ROUTES
        require(self.routing_replay is not True or reports, "rollout.routing_replay", True,
                f"auto or false with rollout.engine: {self.engine}, which {NO_ROUTES.get(self.engine)}")  # fmt: skip
        require(self.lag in (0, 1), "rollout.lag", self.lag, "0 or 1 steps")
        require(all(self.stop), "rollout.stop", self.stop, "texts of at least one character")
        require(sum(map(len, self.stop)) <= MOST_STOP_CHARACTERS, "rollout.stop", self.stop,
                f"at most {MOST_STOP_CHARACTERS} characters in all")  # fmt: skip
        require(0 <= self.min_new_tokens < self.max_completion_length, "rollout.min_new_tokens", self.min_new_tokens,
                f"from 0 to less than rollout.max_completion_length = {self.max_completion_length}")  # fmt: skip
        require(self.max_resamples >= 0, "rollout.max_resamples", self.max_resamples, "0 (off) or more rounds")
        require(self.max_tokens_in_flight == "auto" or self.max_tokens_in_flight >= 1, "rollout.max_tokens_in_flight",
                self.max_tokens_in_flight, "at least 1, or auto")  # fmt: skip

    @property
    def cuts_off(self) -> bool:
        """Whether some tokens are never drawn."""
        return truncates(self.top_p, self.top_k, self.min_p) or self.min_new_tokens > 0 or bool(self.banned_tokens)
