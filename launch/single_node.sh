#!/usr/bin/env bash
# Train on all GPUs of this machine, or without GPUs on two CPU ranks. Arguments go to grpo_dist.train.
#
#     launch/single_node.sh --config configs/quickstart.yaml --train.num_train_steps 50
#
# NUM_PROCESSES      ranks                                              [one per GPU; 2 without a GPU]
# ACCELERATE_CONFIG  a name from accelerate_configs/, or a file's path  [zero2; ddp where there is no DeepSpeed]
# OMP_NUM_THREADS    CPU threads of each rank                           [cores ÷ ranks]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# A mistake in an option ends here, and so does --help: the launcher would add a traceback, and each rank would answer.
status=0
python -c 'import sys; from grpo_dist.config.parse import refuse_mistakes; refuse_mistakes(); sys.exit(99)' "$@" || status=$?
((status == 99)) || exit "$status"

# GPUs, cores of this process, and a free port: two runs on one machine must not both use the default port.
machine=$(python -c '
import importlib.util, os, socket, torch
num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), num_cores, free.getsockname()[1],
          "zero2" if importlib.util.find_spec("deepspeed") else "ddp")
')
read -r num_gpus num_cores port strategy <<<"$machine"

config=${ACCELERATE_CONFIG:-$strategy}
[[ -f $config ]] || config=$root/accelerate_configs/$config.yaml
[[ -f $config ]] || die "ACCELERATE_CONFIG=$ACCELERATE_CONFIG is neither a file nor a name from accelerate_configs/"

ranks=${NUM_PROCESSES:-$((num_gpus > 0 ? num_gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cores > ranks ? num_cores / ranks : 1))}
# Tell DeepSpeed that there are no GPUs. Otherwise every process warns.
if ((num_gpus == 0)); then export DS_ACCELERATOR=cpu; fi
exec accelerate launch --config_file "$config" --num_processes "$ranks" --main_process_port "$port" \
  -m grpo_dist.train "$@"
