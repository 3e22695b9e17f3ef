#!/bin/sh
# One node of 8 GPUs: sh examples/mm_eureka/train.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nproc-per-node "${GPUS:-8}" -m megatron_mmrl.train --config configs/presets/mm_eureka_7b.yaml "$@"
