# Every target runs from a fresh checkout: `setup` brings what is missing.
# The first Python on PATH that is new enough; `make PYTHON=… setup` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
# uv, pip and the jar cache keep their files below the user's home; where no home can be written, in the checkout.
ifneq ($(shell test -d "$(HOME)" && test -w "$(HOME)" && echo yes),yes)
export HOME := $(CURDIR)/.home
endif
# deploy/install_uv.sh puts uv there when there is none on PATH.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(HOME)/.local/bin/uv)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench faults docs lock clean

help: ## print the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

setup: .venv/.synced ## install uv if missing, then everything into .venv

.venv/.synced: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python: expected 3.11 or newer on PATH, found $$(python3 --version 2>&1). Install it \
	(Debian, Ubuntu: apt install python3.11 python3.11-venv), or name one: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@$(UV) --version >/dev/null 2>&1 || PYTHON="$(PYTHON)" deploy/install_uv.sh
	@test -d .venv || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --no-deps --python $(BIN)/python -e .
	@touch $@

demo: setup ## the whole system on real impressions, about 2 minutes, with a rollback
	$(BIN)/headrace demo

# Tests wait for processes more than they compute: on two cores, three at a time keep both busy.
JOBS ?= 3
test: setup ## every test, JOBS at a time, against a real Apache Kafka
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: setup ## lint, format, types, imports, declared dependencies, dead code, sizes, pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry headrace
	$(BIN)/deptry stream model state deploy --non-dev-dependency-groups worker,schema-registry,onnx,pictures
	$(BIN)/deptry tests bench --exclude '\.venv' --ignore DEP002 --non-dev-dependency-groups worker,schema-registry,onnx,pictures,dev
	$(BIN)/python -m tests.house
	$(BIN)/python -m deploy.docs --check
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_asyncapi.py

format: setup ## fix what the formatter and the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated pages again
	$(BIN)/python -m deploy.docs

bench: setup ## every benchmark, one JSON line each, about 20 minutes; load at a tenth of its size
	@for run in train.py join.py score.py deltas.py recovery.py "load.py --events 1000000"; do \
	echo "== $$run"; $(BIN)/python bench/$$run || exit 1; done

RUNS ?= 61
SEED ?= 1
FAMILY ?= join
faults: setup ## RUNS faults from SEED on, each checked; FAMILY=join, snapshots (versions, deltas, replicas), or versions (upgrades)
	$(BIN)/python -m tests.faults$(if $(filter-out join,$(FAMILY)),.$(FAMILY)) \
	$(if $(filter-out versions,$(FAMILY)),--runs $(RUNS) --seed $(SEED) --jobs $(JOBS) --write-docs)

lock: ## resolve requirements.lock again from pyproject.toml
	$(UV) pip compile pyproject.toml --group worker --group schema-registry --group onnx --group pictures --group dev --universal --generate-hashes --no-annotate --no-header --upgrade -o requirements.lock

clean: ## remove .venv and what the local Kafka and the workers left
	rm -rf .venv .headrace
