# One verb for each chore, for people and CI alike. PYTHON picks the interpreter of a new environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.baton-installed
ARGS ?=

.PHONY: help setup serve test check format protos bench fuzz test-gpu clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## make .venv and install everything (1.7 to 5.5 GB, two to three minutes)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Baton needs Python 3.11 or 3.12: install one, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing: torch is most of it, so this takes two to three minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e ".[dev]"
	@touch $(STAMP)

serve: $(STAMP) ## start a cluster here; settings: make serve ARGS="--decode 2"
	@$(BIN)/baton serve $(ARGS)

test: $(STAMP) ## unit, contract and end-to-end tests, all without a GPU
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

check: $(STAMP) ## ruff, mypy --strict, buf lint, stub drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_stubs.py tests/test_imports.py

format: $(STAMP) ## mend layout and what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(STAMP) ## make the stubs beside protos/baton/v1/*.proto anew
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos \
		protos/baton/v1/*.proto
	$(BIN)/buf lint

bench: $(STAMP) ## engine beside transformers, host work, tensor parallelism: an hour; ARGS=--quick: minutes
	@failed=0; for one in engine host_work tensor_parallel; do \
		echo "== benchmarks/$$one.py"; $(BIN)/python -m benchmarks.$$one $(ARGS) || failed=1; done; exit $$failed

fuzz: $(STAMP) ## 200,000 steps of the KV state machine, half an hour; fewer: make fuzz ARGS=10000
	$(BIN)/python -m tests.kv_machine $(ARGS)

test-gpu: $(STAMP) ## tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

clean: ## caches and build products; the environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .out
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
