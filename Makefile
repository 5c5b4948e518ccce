# Everything runs from a virtual environment made here, from this repository and the package index alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all test-cuda soak test-oldest lint format types check lock clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## the main job: train a small Llama in two stages and audit it
	$(BIN)/frostline demo

test: $(STAMP) ## every fast test
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(STAMP) ## every test, slow ones too
	$(BIN)/python -m pytest $(PARALLEL)

test-cuda: $(STAMP) ## what needs a CUDA device
	$(BIN)/python -m pytest -m cuda

OLDEST := .venv-oldest
test-oldest: ## every fast test on the oldest supported transformers; tests/versions.py says what differs there
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt transformers==5.14.0 -e '.[dev]'
	$(OLDEST)/bin/python -m pytest -m "not slow" $(PARALLEL)

soak: $(STAMP) ## one demo-sized run killed 100 times, against the same run left alone
	rm -rf runs/soak
	$(BIN)/python benchmarks/soak.py runs/soak --kills 100

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test ## what CI runs

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

.PHONY: docs
docs: $(STAMP) ## rewrite the pages that are made from the sources
	$(BIN)/python -c "from frostline.recipe.describe import recipe_markdown; print(recipe_markdown(), end='')" > docs/recipe.md

.PHONY: bench bench-all bench-gpu
bench: $(STAMP) ## the benchmark's 12 core cells on this CPU, within an hour on two cores
	$(BIN)/python benchmarks/bench/run.py core --plot .bench/bench.png

bench-all: $(STAMP) ## one more cell of the benchmark; call it again for the next
	$(BIN)/python benchmarks/bench/run.py next --reps 5 --plot .bench/bench.png

bench-gpu: ## the benchmark on one CUDA device, in the environment that is active
	python benchmarks/bench/gpu.py bench-gpu.json
