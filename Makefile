# `make demo` and `make test` work on a fresh clone with Python 3.11+ and make alone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check fast nightly clean

demo: $(STAMP)
	$(BIN)/vitray demo demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not nightly"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) fast

fast: $(STAMP)
	$(BIN)/python -m pytest -q -m "not nightly and not ray and not s3"

nightly: $(STAMP)
	$(BIN)/python -m pytest -q

$(STAMP): pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q -e ".[dev]" -c cluster/constraints.txt
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
