# Every target makes the virtual environment it needs. `make study` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help study test lint format types check wheel pocket clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(BIN)/.dev: $(BIN)/.run
	$(PIP) --editable '.[test,lint]'
	@touch $@

$(BIN)/.pocket: $(BIN)/.run
	$(PIP) --editable '.[pocket]'
	@touch $@

study: $(BIN)/.run ## the pocket study, from nothing to runs/pocket/report.html
	$(BIN)/lorascope study

test: $(BIN)/.dev ## all tests; those of times and memory apart
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not figures"
	$(BIN)/python -m pytest -m figures

lint: $(BIN)/.dev ## ruff, format check included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/.dev ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(BIN)/.dev ## mypy, strict
	$(BIN)/mypy

check: lint types test ## what CI runs

wheel: $(BIN)/.dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel

pocket: $(BIN)/.pocket ## train the pocket world again (hours on a CPU; needs npm)
	$(BIN)/python -m recipes.pocket --work-dir build/pocket --out src/lorascope/pocket

clean: ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) build/lib dist .pytest_cache .mypy_cache .ruff_cache
