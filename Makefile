# Everything a developer or a user does here, the virtual environment included.
# `make test PYTHON=python3.12 VENV=.venv312` chooses another Python.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
STRESS_ARGS ?=
DOCS_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help example examples test test-quick test-minimal stress bench bench-more docs docs-links dist lint types format clean

help:
	@echo "make example   train a continuous-depth network on real data, beside a residual network"
	@echo "make examples  run every example"
	@echo "make test      run the tests; PYTEST_ARGS='-k solver' chooses some"
	@echo "make test-quick  run some of them, in about two minutes"
	@echo "make test-minimal  run the core of the tests with the oldest TensorFlow and Keras that pyproject.toml allows"
	@echo "make stress    random programs until 100,000 problems are solved; STRESS_ARGS='--problems 5000' for fewer"
	@echo "make bench     compare with other libraries, in environments of their own; BENCH_ARGS=--quick for a first look"
	@echo "make bench-more  error against time, numbers of steps, plain fit beside XLA, and how the time of a step grows"
	@echo "make docs      build the site in docs/_build/html, run its code and check its links; any fault is an error"
	@echo "make docs-links  check the links of the site to other sites, for which it needs a network"
	@echo "make dist      build the wheel and the sdist, and try them in a fresh environment"
	@echo "make lint      check style and format"
	@echo "make types     check the types of the package"
	@echo "make format    put both right where ruff can"
	@echo "make clean     remove the virtual environment and every output"

example: $(INSTALLED)
	$(BIN)/python examples/digits.py

examples: $(INSTALLED)
	@set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example; done

# Every worker imports TensorFlow, so a few long-lived ones that steal work from each other. Compiled programs stay in the
# memory of a worker, so all tests take two runs, each with new workers. test_minimal.py is a part of `make test-minimal`:
# what it uses has stricter tests elsewhere.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 10

test: $(INSTALLED)
ifeq ($(strip $(PYTEST_ARGS)),)
	$(PYTEST) --ignore-glob='tests/test_[g-z]*.py'
	$(PYTEST) tests --ignore-glob='tests/test_[a-f]*.py' --ignore=tests/test_minimal.py
else
	$(PYTEST) $(PYTEST_ARGS)
endif

# For the work in between: numerics, signatures and the gradients of a solve, in about two minutes.
QUICK_TESTS := \
	tests/test_tableaus.py \
	tests/test_step_size.py \
	tests/test_clock.py \
	tests/test_solutions.py \
	tests/test_signatures.py \
	tests/test_gradients.py::test_gradients_equal_finite_differences \
	tests/test_mixed_precision.py \
	tests/test_likelihood_model.py \
	tests/test_ode_rnn_cell.py \
	tests/test_public_api.py \
	tests/test_utils.py

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS) $(QUICK_TESTS)

# The core of the suite on the lower bounds of pyproject.toml: solutions, gradients, layers, saving, export. The saved files
# among the fixtures are of newer versions of Keras, whose configs older ones do not read.
MINIMAL_TESTS := \
	tests/test_minimal.py \
	tests/test_saved_model.py \
	tests/test_step_at.py \
	tests/test_ode_rnn.py::test_it_is_a_solve_to_every_observation_and_a_call_of_the_cell \
	tests/test_gradients.py::test_gradients_equal_finite_differences

test-minimal: $(VENV)-minimal/.installed
	$(VENV)-minimal/bin/python -m pytest $(MINIMAL_TESTS)

$(VENV)-minimal/.installed: tests/requirements-minimal.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-minimal
	$(VENV)-minimal/bin/python -m pip install --quiet --requirement $<
	$(VENV)-minimal/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

stress: $(INSTALLED)
	$(BIN)/python benchmarks/stress.py $(STRESS_ARGS)

PEERS := --python $(BIN)/python --torch-python $(VENV)-torch/bin/python --jax-python $(VENV)-jax/bin/python

bench: $(INSTALLED) $(VENV)-torch/.installed $(VENV)-jax/.installed
	$(BIN)/python benchmarks/compare.py $(PEERS) $(BENCH_ARGS)
	$(BIN)/python benchmarks/stiff.py --jax-python $(VENV)-jax/bin/python

# Error against time and numbers of steps beside other libraries, plain fit beside XLA, convolutions beside a residual
# network, how the time of a step grows, and what an event costs.
bench-more: $(INSTALLED) $(VENV)-torch/.installed $(VENV)-jax/.installed
	$(BIN)/python benchmarks/curves.py $(PEERS)
	$(BIN)/python benchmarks/steps.py $(PEERS)
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/events.py

$(VENV)-%/.installed: benchmarks/requirements-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --requirement $<
	@touch $@

docs: $(INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet $(DOCS_ARGS) docs docs/_build/html
	@echo "open docs/_build/html/index.html"

docs-links: $(INSTALLED)
	$(BIN)/sphinx-build -b linkcheck -D nb_execution_mode=off --quiet docs docs/_build/links

# A fresh environment with the wheel alone: what it needs must be among its dependencies.
dist: $(INSTALLED)
	rm -rf dist $(VENV)-dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet dist/*.whl
	cd dist && ../$(VENV)-dist/bin/python ../tests/try_wheel.py

types: $(INSTALLED)
	$(BIN)/mypy

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-dist $(VENV)-minimal $(VENV)-torch $(VENV)-jax build dist docs/_build *.egg-info .pytest_cache .ruff_cache *.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
