# Everything runs from a virtual environment that `make setup` creates; nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PROMPT ?= def 
STAGES ?= 2

.PHONY: run test setup check format clean test-gpu test-docker
.DELETE_ON_ERROR:

run: $(STAMP)  ## set up, then generate text with the bundled model on two stages
	@$(BIN)/asyncpipe-coordinator generate --stages $(STAGES) --prompt '$(PROMPT)' --max-new-tokens 96 --temperature 0.7 --seed 3

test: $(STAMP)  ## set up, then run every test
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

test-docker: $(STAMP)  ## build the images and run them, on a Docker engine of its own if none runs here
	@sh tests/install.sh docker
	@$(BIN)/python -m pytest -m docker tests/docker --durations=0 -o faulthandler_timeout=1790

setup: $(STAMP)  ## only set up

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/python -m pip install --quiet --editable '.[worker,dev]'
	@touch $@

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
