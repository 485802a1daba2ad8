PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
VERSIONS ?= 4.56.2 4.57.6 5.0.0 newest
DEMO_ARGS ?=

SOURCES := $(shell find lococo tests -name '*.py')
TESTS := pytest -q -n 2

test test-versions: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help test lint demo test-versions clean
.SECONDARY:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install "$(TORCH)"
	$(VENV)/bin/pip install -e ".[dev]"
	touch $@

test: $(VENV)/.installed ## run the tests
	$(VENV)/bin/$(TESTS)

lint: $(VENV)/.installed ## check style, docstrings and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

demo: $(VENV)/.installed ## run the demo; arguments in DEMO_ARGS
	$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

test-versions: $(VERSIONS:%=.venvs/%/.tested) ## run the tests with each Transformers release in VERSIONS

.venvs/%/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install "transformers$(addprefix ==,$(filter-out newest,$*))" -e ".[dev]"
	touch $@

.venvs/%/.tested: .venvs/%/.installed $(SOURCES)
	$(@D)/bin/$(TESTS)
	touch $@

clean: ## remove virtual environments, build products and caches
	rm -rf .venv .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
