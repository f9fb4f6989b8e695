# `make run` is the tutorial: the product's own commands, in order. `make test` is everything CI checks.
PYTHON ?= python3
BIN := .venv/bin

RUN := runs/stories

.PHONY: run test test-slurm lint
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is too old: give make PYTHON=python3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A corpus and its tokens; the pair, alike but for the stream of values; both as transformers folders; two evaluations;
# one table. Every command picks up where it was: a `make run` that was killed goes on.
run: .venv/.installed
	$(BIN)/python -m llm prepare stories --documents 30000 --train-tokenizer 1024 --out $(RUN)/store
	$(BIN)/python -m llm fit --config configs/stories_classic.yaml --resume auto
	$(BIN)/python -m llm fit --config configs/stories_values.yaml --resume auto
	$(BIN)/python -m llm export $(RUN)/classic $(RUN)/export/classic
	$(BIN)/python -m llm export $(RUN)/values $(RUN)/export/values
	$(BIN)/python -m evals ioi $(RUN)/export/classic $(RUN)/export/values
	$(BIN)/python -m evals run $(RUN)/export/classic $(RUN)/export/values --tasks stories --limit 200
	$(BIN)/python -m evals compare $(RUN)/classic $(RUN)/values \
		--exports $(RUN)/export/classic $(RUN)/export/values --out $(RUN)/comparison

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

# The sbatch scripts on a Slurm cluster of two nodes, which is set up on this machine (apt-get, as root) and ended again.
test-slurm: .venv/.installed
	$(BIN)/python -m pytest -m slurm -rs tests/slurm
