# `make demo` draws pictures into out/, `make test` runs the tests; each sets up .venv by itself.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Debian keeps the venv module in a package of its own.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
GET_VENV := $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y python3-venv
# Small models run fastest on one thread; two test processes use two cores.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
# Each process that tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-floor lint bench bench-eval eval-demo docs clean

demo: $(READY)
	$(BIN)/arvision demo --out out

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu and not network" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow" -n 1

test-floor:
	$(PYTHON) tests/floor.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.kv_cache
	$(BIN)/python -m benchmarks.draft

bench-eval: $(READY)
	$(BIN)/python -m benchmarks.eval_frechet
	$(BIN)/python -m benchmarks.eval_memory

eval-demo: $(READY)
	$(BIN)/arvision eval demo --out out/eval-demo

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv out

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "arvision needs Python 3.10 or newer; set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; $(GET_VENV) && $(PYTHON) -m venv .venv; } || \
		{ echo "python3 has no venv module: install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,all]"
	@touch $@
