"""Install a release of torch as its index has it for Linux, but without the gigabytes of CUDA libraries it depends on.

    python torch_without_cuda.py 2.8.0     into the environment of this Python; takes gcc and nm

Older releases come from the package index only as builds for CUDA, whose import loads a dozen NVIDIA libraries, 2.5 GB,
though none of them computes anything on a machine without a GPU. The CUDA runtime, a few MB, is installed: it is asked
for the number of GPUs; in place of the others is one library whose functions end the process when they are called.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ACCELERATOR = re.compile(r"Requires-Dist: (nvidia-|cuda-|triton)")
SONAME = re.compile(r"\blib(?:cu|nccl|nv)\S*\.so\.\d+")
STAND_IN = "torch/lib/libwithout_cuda.so"
SYMBOL = re.compile(r"_*(?:cu(?!da)|nccl|nv)")


def install(release: str) -> None:
    """Install the release unless it is there; what it depends on apart from CUDA is left to the caller."""
    before = next(iter(importlib.metadata.distributions(name="torch")), None)
    if before is not None:
        made = Path(str(before.locate_file(STAND_IN)))
        if before.version == release and made.is_file():
            return
        made.unlink(missing_ok=True)
    pip("install", "--no-deps", "--force-reinstall", f"torch=={release}")
    torch = importlib.metadata.distribution("torch")
    needs = " ".join(torch.requires or [])
    runtime = re.findall(r"nvidia-cuda-runtime\S*==[\d.]+", needs)
    toolkit = re.findall(r"cuda-toolkit\[.*?\]==([\d.]+)", needs)
    pip("install", *runtime, *(f"cuda-toolkit[cudart]=={release}" for release in toolkit))
    # otherwise the next thing pip installs would bring the rest
    metadata = Path(str(torch.locate_file(f"torch-{torch.version}.dist-info/METADATA")))
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not ACCELERATOR.match(line)))
    stand_in(Path(str(torch.locate_file(STAND_IN))))


def stand_in(made: Path) -> None:
    """Make the library that stands in for those of CUDA which the libraries beside it need."""
    folder = made.parent
    needed, wanted, defined = set(), set(), set()
    for library in folder.glob("*.so*"):
        if library.is_symlink():  # of an earlier call
            continue
        needed |= set(SONAME.findall(output("objdump", "-p", library)))
        for line in output("nm", "-D", library).splitlines():
            *_, kind, name = line.split()
            (wanted if kind in "Uvw" else defined).add(name.partition("@")[0])
    names = sorted(name for name in wanted - defined if SYMBOL.match(name))
    code = "#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in names)
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", made], input=code, text=True, check=True)
    for name in needed - {name for name in needed if name.startswith("libcudart")}:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(made.name)


def output(*command: str | Path) -> str:
    """What a command prints that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def pip(*words: str) -> None:
    """Call the pip of this environment."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)


if __name__ == "__main__":
    install(sys.argv[1])
