#!/bin/sh
# sh examples/siirl_mm_eureka/prepare.sh JSONL [option ...]   image paths are relative to the directory of JSONL
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mmrl data prepare --format mm_eureka --output-dir "$root/data/siirl_mm_eureka" "$@"
