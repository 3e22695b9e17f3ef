# One command each. Every target that needs the environment builds .venv first if it is missing or out of date.
# Variables: PYTHON (interpreter, default: the first Python 3.11 or 3.12 found), PIP_TORCH_ARGS (pip arguments for
# torch alone, such as --index-url of CPU-only builds), ARGS (passed on: make quickstart ARGS="run.seed=1").
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
export PYTHON PIP_TORCH_ARGS

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-full lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## build .venv (other targets do it by themselves)

$(READY): requirements/cpu.txt requirements/cpu-no-deps.txt requirements/dev.txt pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh

quickstart: $(READY)  ## teach a tiny Qwen2.5-VL to read handwriting, about 10 minutes on 2 cores
	@$(BIN)/mmrl quickstart $(ARGS)

test: lint  ## style, types and all tests but the longest tables, about 25 minutes on 2 cores
	@$(PYTEST) -m "not full" tests $(ARGS)

test-fast: $(READY)  ## unit tests only, under a minute
	@$(PYTEST) -m "not full" tests/unit tests/test_architecture.py $(ARGS)

test-full: $(READY)  ## everything
	@$(PYTEST) tests $(ARGS)

lint: $(READY)  ## style and types, of the Dockerfile too
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint Dockerfile

format: $(READY)  ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
