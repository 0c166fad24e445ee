"""A small server with the interface of vLLM's: it samples from a model and PEFT adapters that are loaded while it runs.

    python fake_vllm.py --model MODEL --port 8000 [--max-lora-rank 16] [...]

It takes vLLM's command line too, so that a run can start it. `plant` makes it wrong in the way of its name.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving import Server
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_dist.model.peft import PeftModel
from grpo_dist.model.routing import Routers
from grpo_dist.rollout import Request, RowDecoder, Sampling, decode_all

COMPLETIONS = "/v1/completions"
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": [], "min_tokens": 0,
                            "stop_token_ids": [], "seed": 0}  # fmt: skip


LOADING = threading.Lock()
"""transformers patches torch and its classes while it loads a model: two threads at once would leave them patched."""


def load_model(path: str) -> nn.Module:
    """A directory's model in float32; the caller holds LOADING where it is not the only thread."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class FakeVllm(Server):
    """Serves a directory's model; faults are for completions."""

    def __init__(self, model: str, *, max_rank: int = 16, longest: int = 4096, plant: str = "",
                 host: str = "127.0.0.1", port: int = 0, reports_routes: bool = False) -> None:  # fmt: skip
        """`plant`: `stale` (each adapter is the first one), `scaling` (adapters count twice), `raw` (log-probabilities
        at temperature 1), or nothing. `reports_routes` as vLLM does with --enable-return-routed-experts."""
        super().__init__(lambda _: {}, host, port)
        self.path, self.max_rank, self.longest, self.plant = model, max_rank, longest, plant
        self.reports_routes = reports_routes
        self.base = load_model(model)
        self.adapters: dict[str, tuple[nn.Module, str]] = {}
        self.calls: list[str] = []
        self.most_stops = 4
        self.refuses_adapters = self.refuses_removal = self.keeps_its_cache = self.sleeps = False
        self.bend: Callable[[dict[str, Any]], None] = lambda choice: None
        """What it does to the choice of each answer."""
        self._one = threading.Lock()

    def has_faults(self, path: str) -> bool:
        return path == COMPLETIONS

    def reply(self, path: str, given: Any) -> tuple[int, Any]:
        with self._one:
            self.calls.append(path)
            if path == "/wake_up" or path.startswith("/sleep"):
                self.sleeps = path != "/wake_up"
                return 200, {}
            if self.sleeps:
                return 400, {"error": "its memory is not there"}
            if path == "/v1/models":
                loaded = self.adapters.items()
                adapters = [{"id": name, "parent": self.path, "root": root} for name, (_, root) in loaded]
                return 200, {"data": [{"id": self.path, "root": self.path, "max_model_len": self.longest}, *adapters]}
            if path == COMPLETIONS:
                return self._complete(given)
            if path == "/v1/load_lora_adapter":
                return self._load(given["lora_name"], given["lora_path"])
            if path == "/v1/unload_lora_adapter" and self.refuses_removal:
                return 503, {"error": "busy"}
            if path == "/v1/unload_lora_adapter":
                return (200, {}) if self.adapters.pop(given["lora_name"], None) else (404, {"error": "not loaded"})
            if path == "/collective_rpc":
                with LOADING:
                    model = load_model(given["kwargs"]["weights_path"])
                if self.plant != "stale":
                    self.base = model
            if path.startswith("/reset_prefix_cache"):  # vLLM says no while a request runs, such as one given up
                resets = path.endswith("?reset_running_requests=true") and not self.keeps_its_cache
                return 200, {"success": resets}
            return 200, {}

    def _load(self, name: str, root: str) -> tuple[int, Any]:
        if self.refuses_adapters or not (Path(root) / "adapter_config.json").is_file():
            return 404, {"error": f"No adapter found for {root}"}
        rank = json.loads((Path(root) / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 400, {"error": f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."}
        if name in self.adapters:
            return 400, {"error": f"The lora adapter '{name}' has already been loaded."}
        if self.plant == "stale" and self.adapters:
            self.adapters[name] = (next(iter(self.adapters.values()))[0], root)
            return 200, {}
        with LOADING:
            model = PeftModel.from_pretrained(load_model(self.path), root).merge_and_unload()
        if self.plant == "scaling":
            for weight, plain in zip(model.parameters(), self.base.parameters(), strict=True):
                weight.data += weight.data - plain.data
        self.adapters[name] = (model.eval(), root)
        return 200, {}

    def _complete(self, given: Any) -> tuple[int, Any]:
        name, prompt = given["model"], given["prompt"]
        if name != self.path and name not in self.adapters:
            return 404, {"error": f"The model `{name}` does not exist."}
        if len(given.get("stop", [])) > self.most_stops:
            return 400, {"error": f"List should have at most {self.most_stops} items after validation"}
        if len(prompt) + given["max_tokens"] > self.longest:
            return 400, {"error": f"maximum context length is {self.longest} tokens"}
        model = self.base if name == self.path else self.adapters[name][0]
        given = DEFAULTS | given
        greedy = given["temperature"] == 0
        sampling = Sampling(1.0 if greedy else given["temperature"], given["top_p"], given["top_k"], given["min_p"],
                            greedy, tuple(map(int, given.get("logit_bias", {}))), given["min_tokens"])  # fmt: skip
        (sampled,) = decode_all(RowDecoder(given["stop_token_ids"], given["max_tokens"]), model,
                                [Request(0, 0, prompt, given["seed"])], sampling)  # fmt: skip
        most = self._stopped_at(sampled.ids, given)
        sampled = replace(sampled, ids=sampled.ids[:most], logprobs=sampled.logprobs[:most],
                          finished=sampled.finished or most is not None)  # fmt: skip
        logprobs = sampled.logprobs
        if self.plant == "raw":
            logprobs = self._scores(model, [*prompt, *sampled.ids])[len(prompt) - 1 :]
        choice = {"index": 0, "text": "", "finish_reason": "stop" if sampled.finished else "length",
                  "prompt_token_ids": prompt, "token_ids": sampled.ids,
                  "logprobs": {"token_logprobs": logprobs}}  # fmt: skip
        if self.reports_routes:
            choice["routed_experts"] = self._routes(model, [*prompt, *sampled.ids])
        if "prompt_logprobs" in given:
            scores = self._scores(model, prompt)
            choice["prompt_logprobs"] = [None, *({str(token): {"logprob": score, "rank": 1}}
                                                 for token, score in zip(prompt[1:], scores, strict=True))]  # fmt: skip
        self.bend(choice)
        return 200, {"model": name, "choices": [choice]}

    def _stopped_at(self, ids: list[int], given: dict[str, Any]) -> int | None:
        """Where a stop string ends a completion, by its text after each token."""
        if not given["stop"]:
            return None
        assert not given.get("skip_special_tokens") and given.get("ignore_eos", True)
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        for length in range(given["min_tokens"] + 1, len(ids) + 1):
            before, text = (tokenizer.decode(ids[:most]) for most in (length - 1, length))
            if any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in given["stop"]):
                return length
        return None

    @staticmethod
    @torch.no_grad()
    def _routes(model: Any, ids: list[int]) -> str:
        """The experts of all tokens but the last, of all layers: those without experts have zeros."""
        routers = Routers(model)
        try:
            model(input_ids=torch.tensor([ids[:-1]]))
            taken = routers.recorded()
        finally:
            routers.remove()
        table = taken.new_zeros(len(ids) - 1, model.config.num_hidden_layers, taken.shape[-1])
        table[:, routers.layers] = taken
        with io.BytesIO() as file:
            np.save(file, table.numpy())
            return base64.b64encode(file.getvalue()).decode()

    @staticmethod
    @torch.no_grad()
    def _scores(model: nn.Module, ids: list[int]) -> list[float]:
        rows = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        return rows[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def started(words: list[str]) -> FakeVllm:
    """The server that vLLM's command line asks for, as far as a run gives it. Raises SystemExit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--plant", default="")
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    options, _ = parser.parse_known_args(words)
    if options.plant == "ends":
        raise SystemExit("fake_vllm: no device")
    with LOADING:
        return FakeVllm(options.model, max_rank=options.max_lora_rank, longest=options.max_model_len,
                        plant=options.plant, host=options.host, port=options.port,
                        reports_routes=options.enable_return_routed_experts)  # fmt: skip


PROGRAM = """#!{python} -IS
import json, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as link, link.makefile("rw") as lines:
    print(json.dumps(sys.argv[1:]), file=lines, flush=True)
    if words := lines.readline():
        print(words, end="", flush=True)
        lines.readline()
sys.exit(words or 1)
"""


@functools.cache
def door() -> int:
    """The port at which this process serves for programs of `PROGRAM`, which need not import torch."""
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            threading.Thread(target=_serve_for, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    return int(listener.getsockname()[1])


def _serve_for(link: socket.socket) -> None:
    """Be the server of a program until it ends."""
    with link, link.makefile("rw") as lines:
        try:
            server = started(json.loads(lines.readline()))
            with server:
                print(f"serving {server.path} at {server.url}", file=lines, flush=True)
                lines.read()
        except SystemExit as end:
            print(end, file=lines, flush=True)


def main() -> None:
    """A server in a process of its own."""
    torch.set_num_threads(1)
    server = started(sys.argv[1:])
    with server:
        print(f"serving {server.path} at {server.url}", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
