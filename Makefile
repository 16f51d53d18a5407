# TORCH is what a bare machine installs first; a GPU machine that already has a torch in range keeps it.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled kernels are kept beside the project, so that a second run starts warm.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

.PHONY: run test lint clean
run: $(VENV)/.base
	$(BIN)/fusecomp generate models/pico-llama --max-tokens 48 --temperature 0 --prompt 'def read_file(path):' --prompt 'import os'
	$(BIN)/fusecomp generate models/pico-moe --max-tokens 48 --temperature 0 --prompt 'def read_file(path):' --prompt 'class Node:'

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) .cache build *.egg-info
