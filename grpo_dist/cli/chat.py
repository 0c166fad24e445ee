"""`python -m grpo_dist chat`: talk to what a run has trained, and hear its base model's answer beside it.

    python -m grpo_dist chat runs/quickstart
    python -m grpo_dist chat runs/quickstart --prompt "What is 12 - 7? Answer with an integer."

Prompts go through the tokenizer's chat template, with data.system_prompt, unless there is none or data.chat_template is
`never`; each model then remembers its own side of the conversation. Answers are the likeliest unless --temperature is
given; what is drawn then keeps to the run's top_p, top_k and min_p. The penalties and limits of the model's
generation_config.json have no part in it, as in training. Ctrl-D or an empty line ends it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from ..config.checks import require


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_or_checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="train.output_dir, or a "
                        "checkpoint in it")  # fmt: skip
    parser.add_argument("--prompt", help="answer this alone and end")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (rollout.max_completion_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Answer one prompt, or whatever is typed. Raises ValueError, OSError."""
    require(not rest, "arguments", list(rest), "a run or a checkpoint, and the options of --help")
    require(options.temperature >= 0, "--temperature", options.temperature, "0 or more")
    require(options.max_new_tokens is None or options.max_new_tokens > 0, "--max_new_tokens", options.max_new_tokens,
            "at least 1")  # fmt: skip
    from ..checkpoint.trained import find, load
    from ..monitoring.console import set_up_logging
    from .conversation import Conversation  # torch; a mistake in the options should not wait for it

    set_up_logging()
    trained = find(options.run_or_checkpoint)
    policy, tokenizer = load(trained)
    conversation = Conversation(trained, policy, tokenizer, options.temperature, options.max_new_tokens, options.seed)
    if options.prompt is not None:
        conversation.answer(options.prompt)
        return 0
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while prompt := input("you> ").strip():
            conversation.answer(prompt)
    return 0
