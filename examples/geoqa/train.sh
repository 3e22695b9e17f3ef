#!/bin/sh
# One node of 8 GPUs: sh examples/geoqa/train.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nproc-per-node "${GPUS:-8}" -m megatron_mmrl.train --config configs/presets/geoqa_3b.yaml "$@"
