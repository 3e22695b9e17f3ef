#!/bin/sh
# One node of 2 GPUs: sh examples/mathvista_dr_grpo/train.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nproc-per-node "${GPUS:-2}" -m megatron_mmrl.train --config configs/presets/mathvista_dr_grpo.yaml "$@"
