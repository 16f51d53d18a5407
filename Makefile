# TORCH is what a bare machine installs first. With TORCH=torch the environment sees PYTHON's own packages, and keeps its
# torch when that is in range.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled kernels are kept beside the project, so that a second run starts warm.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(if $(filter torch,$(TORCH)),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

.PHONY: run test lint clean
run: $(VENV)/.base
	for model in pico-llama pico-moe; do \
	  $(BIN)/fusecomp generate models/$$model --prompts-file models/prompts.jsonl \
	    --max-tokens 64 --temperature 0.7 --top-p 0.9 --seed 4 || exit 1; done

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) .cache build *.egg-info
