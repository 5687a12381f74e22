# Two commands do everything: `make demo` and `make test`. Both make .venv first, with uv.
.PHONY: demo test test-gpu test-slow chaos lint fmt tables bench reproduce kafka clean
SHELL := /bin/bash

PYTHON ?= >=3.11,<3.14  # any installed version in this range
UV := $(or $(shell command -v uv 2>/dev/null),.cache/uv/bin/uv)
IN := .venv/bin
# compile bytecode once (half a minute): otherwise each command may compile again, and starts half as fast
INSTALL = $(UV) pip install --quiet --compile-bytecode --python .venv

demo: .venv/.demo
	$(IN)/streamlearn demo --output demo

test: .venv/.dev
	$(IN)/python -m pytest -m "not slow and not chaos" $(ARGS)

test-gpu: .venv/.dev  # the contract tests on a GPU, recurrent models first: a few minutes
	STREAMLEARN_TEST_DEVICE=cuda $(IN)/python -m pytest tests/contract/test_recipes.py -q -x -k recurrent $(ARGS)
	STREAMLEARN_TEST_DEVICE=cuda $(IN)/python -m pytest tests/contract/test_recipes.py -q -k "not recurrent" $(ARGS)

test-slow: .venv/.dev
	$(IN)/python -m pytest -m slow $(ARGS)

chaos: .venv/.dev  # try every fault for real and write docs/reliability.md: two hours; skips finished cases
	$(IN)/python -m pytest tests/chaos -m chaos $(ARGS); code=$$?; $(IN)/python -m tests.support.chaos.report && exit $$code

lint: .venv/.dev
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	$(IN)/mypy

fmt: .venv/.dev
	$(IN)/ruff check --fix .
	$(IN)/ruff format .

tables: .venv/.dev  # the tables in ARCHITECTURE.md and docs/ that come from the code
	$(IN)/python -m tests.test_layers
	$(IN)/python -m tests.support.tables

bench: .venv/.dev
	$(IN)/python -m benchmarks $(ARGS)

reproduce: .venv/.dev  # rerun the published tables and write docs/results.md: hours; skips finished cells
	$(IN)/python -m benchmarks.reproduce $(ARGS)

kafka: .venv/.dev  # run the tests' broker on localhost:9092 until Ctrl-C
	$(IN)/python -m benchmarks.kafka_broker

clean:
	rm -rf .venv .cache demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

.cache/uv/bin/uv:  # only if the machine has no uv
	python3 -m venv .cache/uv
	.cache/uv/bin/pip install --quiet uv

.venv/bin/python: | $(filter .cache/%,$(UV))
	$(UV) venv --quiet --allow-existing --python "$(strip $(PYTHON))" .venv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[demo]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/.demo
