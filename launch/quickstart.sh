#!/usr/bin/env bash
# From nothing to a trained model: set up, then GRPO of the embedded toy model under DeepSpeed ZeRO-2 on every GPU, or
# without any on two CPU ranks. Arguments override the config: launch/quickstart.sh --train.num_train_steps 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec launch/single_node.sh --config configs/quickstart.yaml "$@"
