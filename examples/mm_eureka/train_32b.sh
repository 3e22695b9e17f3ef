#!/bin/sh
# Two nodes of 8 GPUs, with one file system; on each of them, NODE_RANK being 0 or 1:
# MASTER_ADDR=HOST NODE_RANK=N sh examples/mm_eureka/train_32b.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nnodes "${NODES:-2}" --node-rank "${NODE_RANK:?0 on the first node, 1 on the second}" \
    --master-addr "${MASTER_ADDR:?the name of the first node}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${GPUS:-8}" -m megatron_mmrl.train --config configs/presets/mm_eureka_32b.yaml "$@"
