#!/bin/sh
# sh examples/clevr_count/prepare.sh FILE ... [option ...]
set -eu
cd "$(dirname "$0")/../.."
mmrl data prepare --format clevr_cogen --test-split 1 --output-dir data/clevr_count "$@"
