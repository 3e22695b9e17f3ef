#!/bin/sh
# sh examples/mm_eureka/prepare.sh FILE ...   MMK12 parquet files, or jsonl whose images lie below $IMAGES
set -eu
cd "$(dirname "$0")/../.."
case $1 in
*.jsonl) mmrl data prepare "$@" --format mm_eureka --image-root "${IMAGES:-$(dirname "$1")}" --test-split 0 --output-dir data/mm_eureka ;;
*) mmrl data prepare "$@" --format mmk12 --test-split 0 --output-dir data/mm_eureka ;;
esac
