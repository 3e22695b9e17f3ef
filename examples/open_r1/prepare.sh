#!/bin/sh
# sh examples/open_r1/prepare.sh FILE ... [option ...]
set -eu
cd "$(dirname "$0")/../.."
mmrl data prepare --format open_r1 --test-split 1 --output-dir data/open_r1 "$@"
