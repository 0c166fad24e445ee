"""`python -m grpo_dist chat`: talk to a trained model and see the answers of its base model beside it.

    python -m grpo_dist chat runs/quickstart
    python -m grpo_dist chat runs/quickstart --prompt "What is 12 - 7? Answer with an integer."

Prompts go through the tokenizer's chat template, with data.system_prompt, unless the tokenizer has none or
data.chat_template is `never`. With a template, each model remembers its own conversation. Answers are greedy unless
--temperature is given; sampling then uses the run's top_p, top_k and min_p. Stop texts, banned tokens and
min_new_tokens are the run's. The penalties and limits of the model's generation_config.json are not used, as in
training. Ctrl-D or an empty line ends the chat.
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
    parser.add_argument("--prompt", help="answer this prompt and end")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (rollout.max_completion_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Answer one prompt, or each typed one. Raises ValueError, OSError."""
    require(not rest, "arguments", list(rest), "a run or a checkpoint, and the options of --help")
    require(options.temperature >= 0, "--temperature", options.temperature, "0 or more")
    require(options.max_new_tokens is None or options.max_new_tokens > 0, "--max_new_tokens", options.max_new_tokens,
            "at least 1")  # fmt: skip
    from ..checkpoint.trained import find, load
    from ..monitoring.console import set_up_logging
    from .conversation import Conversation  # imports torch: an error in the options should not wait for it

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
