"""Python as a tool: programs of the model run in the sandbox of the `code` reward, and their output is the answer."""

from __future__ import annotations

from grpo_dist.rewards.sandbox import Limits, Sandbox

SANDBOX = Sandbox(Limits(seconds=5.0, output_bytes=1 << 16))
"""Made at the import, so that a machine whose kernel does not isolate programs is refused when a run starts."""


def python(code: str) -> str:
    """
    Run a Python program and read what it prints.

    Args:
        code: The program. It has the standard library, no files and no network, and five seconds.
    """
    outcome = SANDBOX.run(code)
    if outcome.ending == "timeout":
        return f"{outcome.stdout}Error: the program took longer than {SANDBOX.limits.seconds:g} seconds"
    if outcome.ending == "output":
        return f"{outcome.stdout[:1000]}\nError: the program printed too much"
    if outcome.exit_code:
        return f"{outcome.stdout}Error: {last_line(outcome.stderr) or f'exit code {outcome.exit_code}'}"
    return outcome.stdout or "The program printed nothing. Use print()."


def last_line(text: str) -> str:
    """The last line of a traceback, which says what went wrong."""
    return text.strip().rpartition("\n")[2]
