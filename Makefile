SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: help demo test check docs bench recipes format clean
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## Say what there is to make.
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY)  ## Fine-tune a small language model on this machine, from data to merged model.
	$(BIN)/veneer demo --output runs/demo --force

# One thread a worker: two workers with two threads each would fight over two cores.
test: $(READY)  ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q

check: $(READY)  ## Format, lint, types, import contracts, generated docs, tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(MAKE) --no-print-directory test

docs: $(READY)  ## Write the generated reference pages.
	$(BIN)/python docs/generate.py

bench: $(READY)  ## Measure against PEFT; wants a quiet machine.
	$(BIN)/python benchmarks/bench_inject.py
	$(BIN)/python benchmarks/bench_step.py
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_variants.py
	$(BIN)/python benchmarks/bench_adapters.py
	$(BIN)/python benchmarks/bench_inits.py
	$(BIN)/python benchmarks/bench_qlora.py

# The originals of the data sets are in FROM, a folder each (recipes/README.md); RECIPES names some of the recipes,
# COMPARE=1 adds full fine-tuning and the head alone.
recipes: $(READY)  ## Run the recipes whole: make recipes FROM=folder [RECIPES="sst2 trec"].
	@test -n "$(FROM)" || { echo 'Say where the data is: make recipes FROM=folder (recipes/README.md)' >&2; exit 2; }
	mkdir -p runs/recipes
	$(BIN)/python recipes/originals.py $(FROM) --into runs/recipes/data
	@# Without espeak-ng the other recipes run all the same.
	-$(BIN)/python recipes/speech.py $(FROM) --into runs/recipes/data
	$(BIN)/python recipes/models.py --into runs/recipes/models
	$(BIN)/python recipes/run.py $(RECIPES) $(if $(COMPARE),--compare) --work runs/recipes

format: $(READY)  ## Format the code and fix what the linter can.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and every cache.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A python that does not start (an uninstalled version behind a shim) is passed over.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    for candidate in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do \
	        if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            found=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$${found:-}" ]; then \
	        echo "veneer needs Python 3.11 or newer with its venv module (Debian: apt install python3-venv);" \
	            "found none. Name one with: make PYTHON=/path/to/python3.12 ..." >&2; \
	        exit 1; \
	    fi; \
	    "$$found" -m venv --clear $(VENV); \
	fi
	@echo "Installing veneer and its tools into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
