# demo, test: from a fresh machine with Python 3.10 to 3.13 and pip. PYTHON= chooses the interpreter, VENV= the folder.
.PHONY: demo test lint bench evidence clean

VENV ?= .venv
CONSTRAINTS := .ci/constraints.txt
SUPPORTED := python3 python3.12 python3.11 python3.13 python3.10 python
PYTHON ?= $(firstword $(foreach p,$(SUPPORTED),$(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(p))))
BIN := $(VENV)/bin

# One thread: the networks are small, and two threads on two cores lose more to waiting than they win.
export OMP_NUM_THREADS ?= 1

demo: $(VENV)/.installed
	$(BIN)/dataparams method=none,data_parameters -m

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/bench.py

evidence: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/evidence.py

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found: name one with make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
