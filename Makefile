# The ways in. `make` alone lists them. VENV=DIR uses another environment than .venv, PYTHON=… another interpreter to make it.
VENV ?= .venv
BIN := $(VENV)/bin
export VENV

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test bench lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: ## the environment from requirements/cpu.txt (nothing if it is up to date)
	@requirements/install.sh

quickstart: venv ## raw rows to a served model, on two cores
	@$(BIN)/python -m ray_ft.quickstart

# Two files of unit tests at once. Those that start clusters and engines have the machine for themselves: two of them at once
# take as long as one after the other, and run out of time.
test: lint ## everything that this machine allows
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest tests/integration tests/multihost

bench: venv ## compare with peers, side by side (two hours on a quiet machine; ONLY="packing ingest": some of it)
	$(BIN)/python -m benchmarks $(ONLY)

lint: venv ## style, types and the direction of imports
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# It greets with a large logo: only a broken contract is worth a screen.
	@echo "$(BIN)/lint-imports"; out=$$($(BIN)/lint-imports 2>&1) && echo "$$out" | tail -n 1 || { echo "$$out"; exit 1; }

format: venv ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove caches and build output; keeps .venv, demo/ and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
