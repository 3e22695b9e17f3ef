#!/usr/bin/env bash
# Builds .venv with everything that a machine without a GPU needs (called by the Makefile, safe to run again).
# PYTHON: interpreter to use (default: the first Python 3.11 or 3.12 found). PIP_TORCH_ARGS: extra pip arguments for
# torch alone, such as --index-url of an index that has CPU-only builds.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 1; }

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if is_supported "$candidate"; then echo "$candidate"; return; fi
    done
    local found
    found=$("${PYTHON:-python3}" -V 2>&1) || found="no working ${PYTHON:-python3}"
    fail "needs Python 3.11 or 3.12, found ${found}; install one (such as your system's python3.11 and" \
        "python3.11-venv packages) or set PYTHON=/path/to/python3.11"
}

python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" -V) has no venv module; install it (such as your system's python3.11-venv package)"

# A venv that an interrupted install left behind may hold half a package, which pip does not notice: start over.
if [ -e .venv/.installing ] || ! is_supported .venv/bin/python; then
    rm -rf .venv
    "$python" -m venv .venv
fi
touch .venv/.installing
rm -f .venv/.ready

# A plain pip: no settings of ours leak in, no questions asked.
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

echo "setting up .venv with $("$python" -V): torch"
# shellcheck disable=SC2086  # PIP_TORCH_ARGS is a list of arguments
pip install -qq ${PIP_TORCH_ARGS:-} torch==2.13.0
echo "setting up .venv: requirements/cpu.txt and dev.txt"
pip install -qq --no-warn-conflicts -r requirements/cpu.txt -r requirements/dev.txt
echo "setting up .venv: sglang, megatron-core, torchvision and megatron_mmrl"
pip install -qq --no-deps -r requirements/cpu-no-deps.txt
pip install -qq --no-deps --no-build-isolation -e .

rm .venv/.installing
touch .venv/.ready
