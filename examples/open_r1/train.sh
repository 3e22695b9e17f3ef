#!/bin/sh
# One node of 8 GPUs: sh examples/open_r1/train.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nproc-per-node "${GPUS:-8}" -m megatron_mmrl.train --config configs/presets/open_r1_3b.yaml "$@"
