"""The toy models that ship with the package. The scripts in `tests/toys/` of the checkout make them."""

from __future__ import annotations

from pathlib import Path

MODELS = {"toy": "toy_model", "toy-carry": "toy_carry_model", "toy-tools": "toy_tools_model"}
"""The directory of each model, beside this file."""


def toy_path(name: str = "toy") -> Path:
    """Return the directory of a toy model. Raises FileNotFoundError where its weights are missing."""
    path = Path(__file__).parent / MODELS[name]
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"no toy model at {path}: install grpo_dist again, or make it in a checkout with "
                                f"`python tests/toys/{name.replace('-', '_')}.py {path}`")  # fmt: skip
    return path
