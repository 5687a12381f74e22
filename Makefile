# Two commands do everything: `make demo` and `make test`. Both make .venv first, with uv.
.PHONY: demo test test-gpu test-slow chaos lint fmt bench reproduce kafka clean
SHELL := /bin/bash

PYTHON ?= >=3.11,<3.14  # any that is here
UV := $(or $(shell command -v uv 2>/dev/null),.cache/uv/bin/uv)
IN := .venv/bin
# compiled once, half a minute: else every start of a command may do it again, and takes twice as long
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

chaos: .venv/.dev  # every fault, tried for real, into docs/reliability.md: two hours, and it goes on where it was stopped
	$(IN)/python -m pytest tests/chaos -m chaos $(ARGS); code=$$?; $(IN)/python -m tests.chaos.report && exit $$code

lint: .venv/.dev
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	$(IN)/mypy

fmt: .venv/.dev
	$(IN)/ruff check --fix .
	$(IN)/ruff format .
	$(IN)/python -m tests.test_layers  # the layer table in ARCHITECTURE.md

bench: .venv/.dev
	$(IN)/python -m benchmarks $(ARGS)

reproduce: .venv/.dev  # the published tables, into docs/results.md: hours, and it goes on where it was stopped
	$(IN)/python -m benchmarks.reproduce $(ARGS)

kafka: .venv/.dev  # the broker that the tests use, on localhost:9092, until Ctrl-C
	$(IN)/python -m tests.support.kafka_broker

clean:
	rm -rf .venv .cache demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

.cache/uv/bin/uv:  # only where the machine has no uv
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
