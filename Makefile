# `make run` is the tutorial: the product's own commands, in order. `make test` is everything CI checks.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2
