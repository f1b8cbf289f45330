# The ways to run fxprune from a checkout. They need make and Python 3.11 or later, nothing else:
# the first one used makes the environment .venv, later ones use it again.
#
#   make demo ARGS="..."     arguments for the command behind a target
#   make fuzz N=2000         how many random networks
#   make PYTHON=python3.12   another interpreter for .venv

PYTHON ?= python3
ARGS ?=
N ?= 500
VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml exactly if .venv holds what pyproject.toml asks for.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fuzz zoo bench bench-step clean

help: ## show this list
	@awk 'BEGIN {FS = ": .*## "} /^[a-z-]+: .*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make or renew .venv, as the others do by themselves

demo: $(READY) ## train a gated LeNet on MNIST, finalise it, show what it became
	@echo "==> demo: python -m tools.train_demo $(ARGS)"
	@$(BIN)/python -m tools.train_demo $(ARGS)

test: $(READY) ## run the tests that are neither slow nor for a GPU
	@echo "==> test: python -m pytest -n auto -m 'not slow and not gpu' $(ARGS)"
	@$(BIN)/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

check: $(READY) ## lint, format, types and tests: what must pass before a commit
	@$(BIN)/python -m tools.check $(ARGS)

fuzz: $(READY) ## put N random networks through fxprune, and print what fails as a network of a few lines
	@echo "==> fuzz: python -m tools.fuzz --cases $(N) $(ARGS)"
	@$(BIN)/python -m tools.fuzz --cases $(N) $(ARGS)

zoo: $(READY) ## put every torchvision model through fxprune (takes long)
	@echo "==> zoo: python -m tools.zoo $(ARGS)"
	@$(BIN)/python -m tools.zoo $(ARGS)

bench: $(READY) ## time instrument and finalize beside Torch-Pruning (pip install -e '.[experiments]')
	@echo "==> bench: python -m tools.bench_compile $(ARGS)"
	@$(BIN)/python -m tools.bench_compile $(ARGS)

bench-step: $(READY) ## time a training step with gates beside the plain one
	@echo "==> bench-step: python -m tools.bench_step $(ARGS)"
	@$(BIN)/python -m tools.bench_step $(ARGS)

clean: ## remove builds, results and caches; .venv stays
	rm -rf build dist out .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find fxprune passes models tools tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fxprune needs Python 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# uv does the same as pip, many times faster; order-only, as installing touches bin/.
$(READY): pyproject.toml | $(BIN)/python
	@echo "==> installing fxprune and its development tools into $(VENV)"
	@if uv --version >/dev/null 2>&1; \
	  then uv pip install --python $(BIN)/python --editable '.[dev]'; \
	  else $(BIN)/python -m pip install --editable '.[dev]'; fi
	@touch $@
