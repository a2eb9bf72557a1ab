# make demo | make test : everything that a fresh machine with Python 3.11+ needs is set up first
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two tests at a time, one thread each; a file's tests stay together, for some share a prepared set or a run.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-lowest lint format clean help

help:
	@echo "make demo       phantom CT -> prepare -> train -> evaluate -> pictures (minutes on two cores)"
	@echo "make test       the tests"
	@echo "make test-long  the tests that take minutes each"
	@echo "make test-lowest  the tests with the lowest versions that setup.cfg allows, in an environment of their own"
	@echo "make lint       ruff"

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dinoct needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/demo.sh

test: $(STAMP)
	$(PYTEST)

test-long: $(STAMP)
	$(PYTEST) -m long --timeout 3600

LOWEST := .venv-lowest

$(LOWEST)/.lowest: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	touch $@ $(LOWEST)/.installed

test-lowest: $(LOWEST)/.lowest
	$(MAKE) test VENV=$(LOWEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info
