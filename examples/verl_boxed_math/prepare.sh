#!/bin/sh
# sh examples/verl_boxed_math/prepare.sh RAW [option ...]   RAW holds geometry3k, mathvision, polymath, scemqa and wemath
set -euf
raw=${1:?"name the directory that holds geometry3k, mathvision, polymath, scemqa and wemath: sh $0 RAW"}
shift
out=$(cd "$(dirname "$0")/../.." && pwd)/data/verl_boxed_math
IFS='
' # a file's name may have spaces
prepare() { # format, pattern of its files' names, options ...
    format=$1
    files=$(find "$raw/$format" -name "$2" | sort)
    : "${files:?none called $2 below $raw/$format}"
    shift 2
    # shellcheck disable=SC2086  # one word for each file
    mmrl data prepare --format "$format" --image-root "$raw" --output-dir "$out/$format" "$@" $files
}
prepare geometry3k "train*.parquet" "$@"
prepare mathvision "test-*.parquet" "$@"
prepare polymath "*.parquet" --split-by image "$@" # its questions stand in the pictures
prepare scemqa "*.json" "$@"
prepare wemath "*.parquet" "$@"
