#!/bin/sh
# sh examples/siirl_mm_eureka/prepare.sh JSONL [option ...]   image paths are relative to the directory of JSONL
set -eu
cd "$(dirname "$0")/../.."
raw=$1
shift
mmrl data prepare "$raw" --format mm_eureka --output-dir data/siirl_mm_eureka "$@"
