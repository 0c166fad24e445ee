#!/usr/bin/env bash
# Set up, then train the shipped toy model with GRPO and DeepSpeed ZeRO-2 on every GPU, or without GPUs on two CPU
# ranks. Arguments override the config: launch/quickstart.sh --train.num_train_steps 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec launch/single_node.sh --config configs/quickstart.yaml "$@"
