"""vLLM with its second model runner on a CPU, which alone reports the experts that tokens take.

That runner needs Triton, and vLLM's CPU build takes only a Triton that compiles for CPUs, which no package has. Here
Triton's interpreter runs its few kernels: slow, and enough for tiny models. With adapters, vLLM has the experts
computed by kernels that exist on GPUs alone, so that such a server has all weights.
"""

from __future__ import annotations

from pathlib import Path

CUSTOMIZED = """\
import os
os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
import triton.backends
class Driver:
    is_active = staticmethod(lambda: True)
triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
"""


def python_that_reports_routes(directory: Path, python: str) -> str:
    """Write what stands for the Python of vLLM's environment."""
    (directory / "custom").mkdir(parents=True)
    (directory / "custom" / "sitecustomize.py").write_text(CUSTOMIZED)
    script = directory / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{directory}/custom" exec "{python}" "$@"\n')
    script.chmod(0o755)
    return str(script)
