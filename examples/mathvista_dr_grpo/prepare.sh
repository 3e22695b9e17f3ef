#!/bin/sh
# sh examples/mathvista_dr_grpo/prepare.sh FILE ... [option ...]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mmrl data prepare --format mathvista --test-split 0 --output-dir "$root/data/mathvista" "$@"
