#!/bin/sh
# sh examples/mm_eureka/prepare.sh FILE ... [option ...]   MMK12 parquet, or jsonl whose images lie below $IMAGES
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
case ${1:?"name the data files: sh $0 FILE ..."} in
*.jsonl) set -- --format mm_eureka --image-root "${IMAGES:-$(dirname "$1")}" "$@" ;;
*) set -- --format mmk12 "$@" ;;
esac
mmrl data prepare --test-split 0 --output-dir "$root/data/mm_eureka" "$@"
