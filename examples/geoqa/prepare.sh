#!/bin/sh
# sh examples/geoqa/prepare.sh FILE ... [option ...]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mmrl data prepare --format geoqa_r1v --test-split 1 --output-dir "$root/data/geoqa" "$@"
