"""What `card_sections.py` measures, one module for each part of the trainer.

To import it chooses Triton's interpreter where there is no GPU, which has to happen before Triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.append(str(Path(__file__).parents[2] / "unit"))
    import triton_interpreter

    triton_interpreter.mend()
