#!/usr/bin/env bash
# Fetch what grpo_dist needs and a machine with a GPU may lack, for one that reaches no package registry.
#
#     tests/gpu/wheels.sh [FOLDER]        on a machine that reaches one; FOLDER is .whl by default
#
# The wheels (Linux, x86-64, Python 3.12, 8 MB) are for an image that has torch 2.11 and transformers 5.17 with what
# these two, accelerate, peft, pyarrow, pandas, tensorboard and pytest need. They travel with the checkout. There:
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
#     export PYTHONPATH=/tmp/site:$PWD HF_HUB_OFFLINE=1
#     python3 -m grpo_dist.train --config configs/quickstart.yaml
#
# The checkout runs from PYTHONPATH as it is: pip reads the bounds in setup.cfg only where it installs the project.
set -euo pipefail

folder=$(realpath -m "${1:-.whl}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The image's own packages stay: none of these replaces torch, transformers or anything they load.
missing=(
  annotated-types datasets dill docstring-parser hjson httpcore2 httpx2 idna jsonargparse multiprocess pydantic
  pydantic-core shtab truststore typeshed-client typing-inspection
)
bench=('trl>=1.16,<1.17')

python=${PYTHON:-${GRPO_DIST_VENV:-.venv}/bin/python}
"$python" -c 'import torch' || {
  echo "$python has no torch, which DeepSpeed's wheel is built with: run launch/setup.sh, or set PYTHON" >&2
  exit 2
}

mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package stop an installation
pip() { "$python" -m pip --disable-pip-version-check "$1" --quiet --no-deps --constraint constraints.txt "${@:2}"; }
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
pip download --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  --dest "$folder" "${missing[@]}" "${bench[@]}"
# DeepSpeed is published as source alone. Without its kernels its wheel is pure Python.
DS_BUILD_OPS=0 pip wheel --no-build-isolation --wheel-dir "$folder" deepspeed
du -sh "$folder"
