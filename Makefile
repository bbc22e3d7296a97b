# make demo   a whole Branch-Train-MiX run on this machine, in a virtual environment of its own
# make test   the test suite
# make test-upstream   the part of the suite that leans on Megatron-Core, for the other release of it
# make test-slurm   the tests on a real Slurm, which it installs (Debian, as root)
# make check  ruff and mypy
# PYTHON=3.11 or PYTHON=/path/to/python3.12 (with VENV=a directory) chooses the Python, and so the Megatron-Core

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
DEMO := examples/demo/recipe.yaml

.PHONY: help demo test test-upstream test-slurm compiled check format clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.installed
	$(BIN)/btx run $(DEMO)

test: compiled
	$(BIN)/python -m pytest -rs -n 3 --dist loadfile --no-loadscope-reorder

UPSTREAM := tests/cli/test_run.py tests/engine tests/megatron_lm tests/weights tests/families tests/mix tests/train \
  tests/tools/test_convert.py tests/examples/test_by_hand.py tests/evaluate tests/recipe tests/data

test-upstream: compiled
	$(BIN)/python -m pytest -rs -n 3 --dist loadfile --no-loadscope-reorder $(UPSTREAM)

test-slurm: compiled
	$(BIN)/python -m tests.slurm.cluster --install
	BTX_TEST_SLURM=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

# The tests start hundreds of processes. Where PYTHONDONTWRITEBYTECODE is set, each would compile all
# of our modules again, which is a sixth of a rank's start.
compiled: $(VENV)/.installed-dev
	$(BIN)/python -m compileall -q megatron_btx tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@tools/make_venv.sh $(VENV) $(PYTHON)

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[hf]'
	@touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[hf,dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
