# Every target runs from a fresh checkout: `setup` brings what is missing.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo $(HOME)/.local/bin/uv)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench docs lock clean

help: ## print the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

setup: .venv/.synced ## install uv if missing, then everything into .venv

.venv/.synced: requirements.lock pyproject.toml
	@command -v uv >/dev/null 2>&1 || test -x $(UV) || deploy/install_uv.sh
	@test -d .venv || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --no-deps --python $(BIN)/python -e .
	@touch $@

demo: setup ## the whole system on real impressions, about 3 minutes, with a rollback
	$(BIN)/headrace demo

test: setup ## every test, against a real Apache Kafka
	$(BIN)/python -m pytest

check: setup ## lint, format, types, import direction, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.docs --check

format: setup ## mend what the formatter and the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated pages again
	$(BIN)/python -m deploy.docs

bench: setup ## every benchmark, one JSON line each
	@for name in train join score; do echo "== $$name"; $(BIN)/python bench/$$name.py || exit 1; done

lock: ## resolve requirements.lock again from pyproject.toml
	$(UV) pip compile pyproject.toml --extra worker --group dev --universal --generate-hashes --no-annotate --no-header --upgrade -o requirements.lock

clean: ## remove .venv and what the local Kafka and the workers left
	rm -rf .venv .headrace
