"""The options of rollouts by vLLM servers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .checks import require

if TYPE_CHECKING:
    from .rollout import RolloutConfig
    from .schema import Config

SHARED = "shared"
"""The word for devices that are the trainer's own."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""


@dataclass
class VllmConfig:
    """Servers that sample: running ones (`urls`), or one that the run starts and stops (`python`)."""

    urls: list[str] | None = None
    """Addresses of running servers, such as [http://node7:8000]; requests are spread over several. null: the run starts
    a server."""
    python: str | None = None
    """The Python of the environment that vLLM is installed in (launch/setup_vllm.sh makes one), to start a server on
    the machine of the first rank."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the server that the run starts, such as "4,5,6,7". `shared`: those of the run, and the
    server gives its memory back while it does not sample. null: what the environment says."""
    args: list[str] = field(default_factory=list)
    """Further arguments of the server that the run starts, such as [--tensor-parallel-size, "4"]."""
    timeout_seconds: float = 600.0
    """Longest time a server may take for an answer. After it, the request is made again."""
    retries: int = 5
    """Failures in a row, with longer and longer waits between them, after which a server is not used any more. The run
    stops with a checkpoint where no server is left."""

    def __post_init__(self) -> None:
        require(self.urls is None or bool(self.urls), "rollout.vllm.urls", self.urls,
                "addresses of servers, or null to start one")  # fmt: skip
        for url in self.urls or ():
            require("@" not in url, "rollout.vllm.urls", f"…@{url.rpartition('@')[2]}",
                    "an address without a user and a password: export a server's key as VLLM_API_KEY")  # fmt: skip
            require(_is_address(url), "rollout.vllm.urls", url, "an address such as http://node7:8000")
        require(len(set(self.urls or ())) == len(self.urls or ()), "rollout.vllm.urls", self.urls, "each server once")
        given = {"urls": self.urls, "python": self.python}
        require((self.urls is None) != (self.python is None), "rollout.vllm", given,
                "the urls of running servers, or the python to start one with; one of the two")  # fmt: skip
        for key in ("devices", "args"):
            require(self.urls is None or not getattr(self, key), f"rollout.vllm.{key}", getattr(self, key),
                    "nothing with urls: it is for a server that the run starts")  # fmt: skip
        require(not any(each.startswith("--api-key") for each in self.args), "rollout.vllm.args", "--api-key",
                "none here: export the key as VLLM_API_KEY, which the server and the run take")  # fmt: skip
        require(self.timeout_seconds > 0, "rollout.vllm.timeout_seconds", self.timeout_seconds, "a number above 0")
        require(self.retries >= 0, "rollout.vllm.retries", self.retries, "0 or more")


def _is_address(url: str) -> bool:
    """Whether it is the address of a server, with a port that can be one."""
    try:
        urlsplit(url).port  # noqa: B018
    except ValueError:
        return False
    return re.fullmatch(r"https?://[^/\s]+(/[^\s?#]*)?", url) is not None


def check_vllm(config: Config) -> None:
    """Raise ValueError for options that vLLM servers cannot serve."""
    rollout = config.rollout
    is_vllm = rollout.engine == "vllm"
    require(is_vllm or rollout.vllm is None, "rollout.vllm", rollout.vllm, "null where rollout.engine is not `vllm`")
    require(not is_vllm or rollout.vllm is not None, "rollout.vllm", None,
            "the urls of servers or the python to start one with, where rollout.engine is `vllm`")  # fmt: skip
    require(not is_vllm or config.lora is None or config.lora.r <= ADAPTER_RANKS[-1], "lora.r",
            config.lora and config.lora.r, f"at most {ADAPTER_RANKS[-1]}, as vLLM serves no higher rank")  # fmt: skip
    experts = config.lora.target_parameters if config.lora else []
    require(not is_vllm or not experts, "lora.target_parameters", experts,
            "[] with rollout.engine `vllm`, which is not given adapters on experts")  # fmt: skip
    require(not is_vllm or rollout.temperature == 1 or not rollout.cuts_off, "rollout.temperature",
            rollout.temperature, "1 with top_p, top_k, min_p, min_new_tokens or banned_tokens: vLLM returns "
            "log-probabilities either before the temperature or after these")  # fmt: skip


def logprobs_mode(rollout: RolloutConfig) -> str:
    """The --logprobs-mode of a server that returns log-probabilities at the temperature and of all tokens."""
    return "raw_logprobs" if rollout.cuts_off else "processed_logprobs"
