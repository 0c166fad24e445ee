#!/usr/bin/env bash
# Run tests on the oldest releases that setup.cfg allows, in a new environment .venv-lowest. For machines without GPUs.
#
#     launch/test_lowest.sh               tests that depend most on the releases, then the quickstart
#     launch/test_lowest.sh tests/unit    arguments go to pytest instead
#
# The exit status is 75 if the releases cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GRPO_DIST_VENV=$PWD/.venv-lowest GRPO_DIST_PINS=constraints-lowest.txt PIP_NO_COMPILE=0
if ! launch/setup.sh; then
  tail -n 40 "$GRPO_DIST_VENV/setup.log" 2>/dev/null | grep -qiE 'connection broken|connection error|timed out' && exit 75
  exit 1
fi
launch/compile.sh
if (($#)); then exec launch/test.sh "$@"; fi
launch/test.sh tests/unit/{model/test_{lora,checks,load,rollout_weights},data/test_{prompts,rows},rollout/test_{own_attention,probe,choose}}.py \
  'tests/distributed/test_invariance.py::test_same_tokens_and_weights[zero2-2]'
rm -rf runs/lowest
exec launch/quickstart.sh --train.output_dir runs/lowest --train.num_train_steps 2
