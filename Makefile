# `make` lists the targets. They need a Python 3.11-3.13 and install everything else into ./.venv.

# The Python to create .venv with; empty: the first of PYTHONS that runs and has a suitable version.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3 python
# For another build of torch, such as CPU only: an --index-url, a --find-links folder ...
TORCH_PIP_ARGS ?=
# Number of test processes, and more arguments for pytest: make test PYTEST_ARGS="-k losses -x"
JOBS ?= 2
PYTEST_ARGS ?=
# What to measure: make bench BENCH_ARGS="--task sft --preset gpt2 --precision bf16"
BENCH_ARGS ?= --task dpo --preset tiny4x256
# Which steps to run, and on which rows: make gpu GPU_ARGS="--only 0-6 --data hh.jsonl.gz --tokenizer gpt2"
GPU_ARGS ?=
# Which faults to inject, and how often: make faults FAULTS_ARGS="--cases 1,14 --kills 3"
FAULTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
CHECK_PYTHON := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo bench gpu faults test test-slow lint typecheck format check wheel clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## Create .venv with everything pinned in constraints.txt

demo: $(READY) ## Tune a small model end to end on this machine (recipes/quickstart.yaml)
	$(BIN)/dpo-run recipe=quickstart run_dir=runs/quickstart

bench: $(READY) ## Measure dpo-run against TRL on this machine
	$(BIN)/python scripts/bench.py $(BENCH_ARGS)

gpu: $(READY) ## Check dpo-run on this machine's GPU, in at most eight minutes
	$(BIN)/python scripts/gpu_check.py $(GPU_ARGS)

faults: $(READY) ## Kill runs, damage their files, fill their disk; print the outcomes (up to an hour)
	$(BIN)/python scripts/faults.py $(FAULTS_ARGS)

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(READY) ## Run the slow tests (whole experiments, compiled code)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(READY) ## Check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

typecheck: $(READY) ## Check types only
	$(BIN)/mypy

format: $(READY) ## Format the code and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test test-slow ## Everything CI runs

wheel: $(READY) ## Build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove builds and caches; keep .venv and runs/
	rm -rf build dist .coverage .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove builds, caches and .venv
	rm -rf $(VENV)

# Torch on its own first: TORCH_PIP_ARGS must not redirect the other packages. With the build
# backend in the environment as well, a later change of pyproject.toml needs no network.
$(READY): pyproject.toml constraints.txt $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(PIP) install -c constraints.txt $(TORCH_PIP_ARGS) torch
	@$(PIP) install -c constraints.txt hatchling
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Each candidate is run: a pyenv shim exists even where its version is not active.
$(BIN)/python:
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if "$$python" -c '$(CHECK_PYTHON)' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$("$$python" --version) ($$python)"; \
	    exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No suitable Python among: $(or $(PYTHON),$(PYTHONS))." >&2; \
	echo "Install Python 3.11, 3.12 or 3.13 with its venv module, or name one:" >&2; \
	echo "  make PYTHON=/path/to/python" >&2; \
	exit 1
