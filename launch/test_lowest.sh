#!/usr/bin/env bash
# Run tests on the oldest releases that setup.cfg allows, in a new environment .venv-lowest. For machines without GPUs.
#
#     launch/test_lowest.sh               tests that depend most on the releases, then the quickstart
#     launch/test_lowest.sh tests/unit    arguments go to pytest instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GRPO_DIST_VENV=$PWD/.venv-lowest GRPO_DIST_PINS=constraints-lowest.txt PIP_NO_COMPILE=1
if (($#)); then exec launch/test.sh "$@"; fi
launch/test.sh tests/unit/model/test_lora.py tests/unit/data/test_prompts.py tests/unit/model/test_checks.py tests/unit/model/test_load.py tests/unit/rollout/test_own_attention.py tests/unit/rollout/test_probe.py tests/unit/model/test_rollout_weights.py \
  'tests/distributed/test_invariance.py::test_same_tokens_and_weights[zero2-2]'
exec launch/quickstart.sh --train.output_dir runs/lowest --train.num_train_steps 2
