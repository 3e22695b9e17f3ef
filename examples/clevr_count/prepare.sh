#!/bin/sh
# sh examples/clevr_count/prepare.sh FILE ... [option ...]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mmrl data prepare --format clevr_cogen --test-split 1 --output-dir "$root/data/clevr_count" "$@"
