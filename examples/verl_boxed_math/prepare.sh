#!/bin/sh
# sh examples/verl_boxed_math/prepare.sh RAW   the directory that holds geometry3k, mathvision, polymath, scemqa and wemath
set -eu
cd "$(dirname "$0")/../.."
raw=$1
out=data/verl_boxed_math
prepare() {  # format, options and files ...
    format=$1
    shift
    mmrl data prepare "$@" --format "$format" --image-root "$raw" --output-dir "$out/$format"
}
parquet() { find "$raw/$1" -name "$2*.parquet" | sort; }
# shellcheck disable=SC2046  # one word per file
{
    prepare geometry3k $(parquet geometry3k train)
    prepare mathvision $(parquet mathvision "test-")
    prepare polymath --split-by image $(parquet polymath "")  # its questions stand in the pictures
    prepare scemqa $(find "$raw/scemqa" -name "*.json" | sort)
    prepare wemath $(parquet wemath "")
}
