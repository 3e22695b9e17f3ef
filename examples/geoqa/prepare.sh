#!/bin/sh
# sh examples/geoqa/prepare.sh FILE ... [option ...]
set -eu
cd "$(dirname "$0")/../.."
mmrl data prepare --format geoqa_r1v --test-split 1 --output-dir data/geoqa "$@"
