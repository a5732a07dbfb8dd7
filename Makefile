# `make demo` and `make test` work on a fresh clone with Python 3.11+ and make alone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo install test test-slow check unit lint wheel docs nightly audit lock soak fuzz bench clean

demo: $(STAMP)
	$(BIN)/vitray demo demo

# The environment .venv, with the development dependencies.
install: $(STAMP)

# Unit, integration and cluster tests, in two processes.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not nightly and not timing" tests/unit tests/integration tests/cluster

# The remaining CI tests, then timing tests with nothing beside them.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "not nightly and not timing" tests/slow
	$(BIN)/python -m pytest -q -n 0 -m "timing and not nightly" tests

check: lint unit

unit: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports pyproject.toml

# Build the wheel, and run a job from a fresh installation of it.
wheel: $(STAMP)
	$(BIN)/python tools/check_wheel.py

# docs/reference.md from the code, then the site in site/.
docs: $(STAMP)
	$(BIN)/python tools/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All tests, one at a time, then the audit.
nightly: $(STAMP)
	$(BIN)/python -m pytest -q -n 0 tests
	$(MAKE) audit

# Check pinned dependencies for known vulnerabilities (asks PyPI's advisory service).
audit: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[audit]" -c cluster/constraints.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r cluster/requirements.txt

# Regenerate cluster/requirements.txt from cluster/constraints.txt.
lock: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[audit]" -c cluster/constraints.txt
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header --no-annotate --extra openvino --extra onnx --extra aws \
		-c cluster/constraints.txt pyproject.toml -o cluster/requirements.txt

# Random faults in a loop for MINUTES; every job must end complete.
MINUTES ?= 60
soak: $(STAMP)
	$(BIN)/python tools/soak.py $(MINUTES)

# Fuzz each reader for SECONDS.
SECONDS ?= 300
fuzz: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[fuzz]" -c cluster/constraints.txt
	for target in decode tar parquet; do $(BIN)/python tools/fuzz.py $$target $(SECONDS) || exit 1; done

# In an environment of its own, because daft needs an older pyarrow and tqdm.
# BENCH and BENCH_FREE pass options on: make bench BENCH='--model vit-b --sizes 64,192'
bench: .venv-bench/.installed
	.venv-bench/bin/python benchmarks/bench_peers.py $(BENCH)
	.venv-bench/bin/python benchmarks/bench_free.py $(BENCH_FREE)

.venv-bench/.installed: pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv .venv-bench
	grep -vE '^(pyarrow|tqdm)=' cluster/constraints.txt > .venv-bench/constraints.txt
	.venv-bench/bin/python -m pip install -q --upgrade "pip>=24"
	.venv-bench/bin/python -m pip install -q -e ".[dev,bench]" -c .venv-bench/constraints.txt
	touch $@

$(STAMP): pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q -e ".[dev]" -c cluster/constraints.txt
	touch $@

clean:
	rm -rf .venv .venv-bench bench demo build site *.egg-info
