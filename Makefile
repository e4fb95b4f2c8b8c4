# Everything a developer or a user does here, the virtual environment included.
# `make test PYTHON=python3.12 VENV=.venv312` chooses another Python.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help example examples test bench bench-more lint format clean

help:
	@echo "make example   train a continuous-depth network on real data, beside a residual network"
	@echo "make examples  run every example"
	@echo "make test      run the tests; PYTEST_ARGS='-k solver' chooses some"
	@echo "make bench     compare with other libraries, in environments of their own; BENCH_ARGS=--quick for a first look"
	@echo "make bench-more  error against time, numbers of steps, plain fit beside XLA, and how the time of a step grows"
	@echo "make lint      check style and format"
	@echo "make format    put both right where ruff can"
	@echo "make clean     remove the virtual environment and every output"

example: $(INSTALLED)
	$(BIN)/python examples/digits.py

examples: $(INSTALLED)
	@set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example; done

# Every worker imports TensorFlow, so a few long-lived ones that steal work from each other.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 10 $(PYTEST_ARGS)

PEERS := --python $(BIN)/python --torch-python $(VENV)-torch/bin/python --jax-python $(VENV)-jax/bin/python

bench: $(INSTALLED) $(VENV)-torch/.installed $(VENV)-jax/.installed
	$(BIN)/python benchmarks/compare.py $(PEERS) $(BENCH_ARGS)

# Error against time and numbers of steps beside other libraries, plain fit beside XLA, and how the time of a step grows.
bench-more: $(INSTALLED) $(VENV)-torch/.installed $(VENV)-jax/.installed
	$(BIN)/python benchmarks/curves.py $(PEERS)
	$(BIN)/python benchmarks/steps.py $(PEERS)
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/scaling.py

$(VENV)-%/.installed: benchmarks/requirements-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --requirement $<
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-torch $(VENV)-jax build dist *.egg-info .pytest_cache .ruff_cache *.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
