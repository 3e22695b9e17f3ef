#!/bin/sh
# sh examples/mathvista_dr_grpo/prepare.sh FILE ... [option ...]
set -eu
cd "$(dirname "$0")/../.."
mmrl data prepare --format mathvista --test-split 0 --output-dir data/mathvista "$@"
