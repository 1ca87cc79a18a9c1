# make train    the quickstart, from a clean clone to a trained model (overrides: ARGS="optim.lr=1e-3")
# make test     format, lint, and every test except the long grid
# make test-all the same with the long grid
# make harness  lm-evaluation-harness against our own loss, in an environment of its own
# make soak     hours of kills, races and steps (ARGS="--kills 5 --worlds 1,2 --steps 500" is shorter)
# make lint     format, lint and types
# make clean    remove what make made; runs/ and prepared/ stay

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Two files at a time. They begin in the order of their names: tests/dist comes first, and takes longest.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := .venv/installed
HARNESS := .venv-harness

.PHONY: help train test test-all harness soak lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

train: $(STAMP)
	$(BIN)/python -m dsv2 prepare stdlib
	$(BIN)/python -m dsv2 train experiment=quickstart $(ARGS)

test: format
	$(PYTEST) -m "not full" $(ARGS)

test-all: format
	$(PYTEST) $(ARGS)

harness: $(STAMP) $(HARNESS)/installed
	$(BIN)/python -m pytest -m harness -s tests/unit/hf/test_harness.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.soak $(ARGS)

lint: format
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is removed first and made last, so an interrupted installation starts again.
# The output shows each package of 10 MB or more while pip downloads it; pip's errors are always shown.
$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) -V 2>/dev/null || echo missing);" \
	    "give one with make PYTHON=python3.11" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (some minutes, 1.5 GB or more)"
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  -r requirements.txt | awk '/(Downloading|Using cached) .*([0-9][0-9]\.[0-9] M|[0-9] G)B\)/ || \
	  /^(Building|Installing collected)/ { print substr($$0, 1, 100); fflush() }'
	@touch $@

$(HARNESS)/installed: requirements-harness.txt
	@rm -f $@
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements-harness.txt
	@touch $@

clean:
	rm -rf .venv .venv-harness .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
