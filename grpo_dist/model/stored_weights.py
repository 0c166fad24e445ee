"""What identifies the weights of a model's directory, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from .files import weight_files

_BLOCK_BYTES = 1024


def weights_fingerprint(path: Path) -> str | None:
    """A hash of the names, types and shapes of all tensors, and of some values of each; None where there are no
    safetensors files.

    Training changes all numbers of a weight, so blocks at its beginning, middle and end are enough. How the tensors
    are divided into files does not matter.
    """
    lines = {}
    for each in weight_files(path):
        with each.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = (8 + length + offset for offset in entry["data_offsets"])
                    kind = json.dumps([name, entry["dtype"], entry["shape"]])
                    lines[name] = kind.encode() + _sample(file, begin, end)
    if not lines:
        return None
    return hashlib.sha256(b"".join(lines[name] for name in sorted(lines))).hexdigest()[:16]


def _sample(file: BinaryIO, begin: int, end: int) -> bytes:
    """Blocks of the bytes from `begin` to `end`: at the beginning, in the middle and at the end."""
    blocks = []
    for place in (begin, (begin + end - _BLOCK_BYTES) // 2, end - _BLOCK_BYTES):
        file.seek(max(begin, place))
        blocks.append(file.read(min(_BLOCK_BYTES, end - begin)))
    return b"".join(blocks)
