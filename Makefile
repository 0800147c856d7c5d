# Two commands matter: `make quickstart` shows the whole thing on a CPU, `make test` checks it.
# Everything runs in an environment outside this folder, made on first use (.ci/environment.py). With SGLANG=0.5.23 (or
# 0.5.19) a target uses that release of SGLang instead of 0.5.17, in a separate environment.

.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first interpreter that can make an environment; override with PYTHON=/path/to/python3.11.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
ENVIRONMENT = $(if $(PYTHON),"$(PYTHON)" .ci/environment.py,{ echo "error: no Python 3.11 with ensurepip found; \
	install python3.11 and python3.11-venv, or run make PYTHON=/path/to/python3.11" >&2; false; })
export SGLANG
# With another release of SGLang, `make test` runs these tests, which meet SGLang, in 15 minutes on two cores.
# Before a release of this package, run TESTS="tests/e2e tests/parity tests/host", which adds faults, capacities, model
# families and refusals.
RELEASES = $(patsubst %,tests/e2e/test_%.py,trio tpla_parity parity sketched_rows speculation requests waiting \
	attention_groups) \
	tests/parity tests/host
TESTS = $(if $(filter-out 0.5.17,$(SGLANG)),$(RELEASES))
WITH_PYTHON = python=$$($(ENVIRONMENT)) && "$$python"

.PHONY: help quickstart test test-fast lint format python fuzz soak accuracy bench-transfer bench-engines clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

quickstart:  ## prefill, TPLA decode and router on this CPU: answers, agreement, cache and wire bytes (4 minutes)
	@python=$$($(ENVIRONMENT)) && exec "$$python" examples/quickstart.py

test:  ## what every change needs (SGLANG=0.5.23: what meets SGLang); all of it by PYTEST_ARGS='-m "not gpu"'
	@$(WITH_PYTHON) -m pytest -m "not gpu and not slow" -n 2 --no-loadscope-reorder $(TESTS) $(PYTEST_ARGS)

test-fast:  ## unit and wire tests, which need no server
	@$(WITH_PYTHON) -m pytest -m "not gpu and not slow" $(wildcard tests/unit tests/wire) $(PYTEST_ARGS)

lint:  ## ruff (rules, format) and mypy
	@python=$$($(ENVIRONMENT)) && "$$python" -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

format:  ## put the code into shape
	@python=$$($(ENVIRONMENT)) && "$$python" -m ruff check --fix . && "$$python" -m ruff format .

python:  ## print the path of the environment's interpreter, making the environment first if need be
	@$(ENVIRONMENT)

fuzz:  ## fuzz the transfer agents for an hour; FUZZ_ARGS="--seconds 600" for less
	@$(WITH_PYTHON) -m tests.fuzz $(FUZZ_ARGS)

soak:  ## 30 minutes of load with random faults on real servers, every answer checked; SOAK_ARGS="--minutes 5" for less
	@$(WITH_PYTHON) -m tests.soak $(SOAK_ARGS)

accuracy:  ## the accuracy tables of docs/accuracy.md, from the checkpoints
	@$(WITH_PYTHON) benchmarks/accuracy.py $(ACCURACY_ARGS)

bench-transfer:  ## goodput of the transfer agent beside raw TCP and memcpy; writes benchmarks/out/transfer.json
	@$(WITH_PYTHON) benchmarks/transfer.py $(BENCH_ARGS)

bench-engines:  ## install mooncake and NIXL for bench-transfer to compare with (no part of the project; mooncake needs libibverbs)
	@$(WITH_PYTHON) -m pip install -q --no-deps --target benchmarks/out/engines \
		mooncake-transfer-engine-non-cuda nixl nixl-cu13

clean:  ## remove what tools left in this folder (the environment stays in the cache)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist benchmarks/out *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
