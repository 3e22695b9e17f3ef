#!/bin/sh
# sh examples/open_r1/prepare.sh FILE ... [option ...]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mmrl data prepare --format open_r1 --test-split 1 --output-dir "$root/data/open_r1" "$@"
