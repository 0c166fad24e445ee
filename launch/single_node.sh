#!/usr/bin/env bash
# Train on all GPUs of this machine, or without GPUs on two CPU ranks. Arguments go to grpo_dist.train.
#
#     launch/single_node.sh --config configs/quickstart.yaml --train.num_train_steps 50
#
# NUM_PROCESSES      ranks                                              [one per GPU; 2 without a GPU]
# ACCELERATE_CONFIG  a name from accelerate_configs/, or a file's path  [zero2; ddp where there is no DeepSpeed]
# SERVER_GPUS        GPUs for a vLLM server, such as 4,5,6,7: the others train   [none]
# VLLM_PYTHON        the Python that starts the server, see launch/setup_vllm.sh  [the config's rollout.vllm.python]
# OMP_NUM_THREADS    CPU threads of each rank                           [cores ÷ ranks]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ ${SERVER_GPUS:-} ]]; then
  visible=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
  export CUDA_VISIBLE_DEVICES=
  for gpu in ${visible//,/ }; do
    [[ ,$SERVER_GPUS, == *,$gpu,* ]] || CUDA_VISIBLE_DEVICES+=${CUDA_VISIBLE_DEVICES:+,}$gpu
  done
  for gpu in ${SERVER_GPUS//,/ }; do
    [[ ,$visible, == *,$gpu,* ]] || die "SERVER_GPUS=$SERVER_GPUS given, expected some of the GPUs $visible"
  done
  [[ $CUDA_VISIBLE_DEVICES ]] || die "SERVER_GPUS=$SERVER_GPUS leaves no GPU for the training"
  set -- "$@" --rollout.engine vllm --rollout.vllm.devices "$SERVER_GPUS" ${VLLM_PYTHON:+--rollout.vllm.python "$VLLM_PYTHON"}
fi

# A mistake in an option ends here, and so does --help: the launcher would add a traceback, and each rank would answer.
status=0
python -c 'import sys; from grpo_dist.preflight.early import refuse_mistakes; refuse_mistakes(before_launch=True); sys.exit(99)' "$@" || status=$?
((status == 99)) || exit "$status"

# GPUs, cores of this process, and a free port: two runs on one machine must not both use the default port.
machine=$(python -c '
import importlib.util, socket, torch
from grpo_dist.distributed.cores import num_cores
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), num_cores(), free.getsockname()[1],
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
# As `accelerate launch`, which also imports transformers, for another of its commands.
exec python -m accelerate.commands.launch --config_file "$config" --num_processes "$ranks" --main_process_port "$port" \
  -m grpo_dist.train "$@"
