# `make run` is the tutorial: the product's own commands, in order. `make test` is everything CI checks.
PYTHON ?= python3
BIN := .venv/bin

RUN := runs/stories
LAST := exports/step-00002300

.PHONY: run test test-slurm browser lint
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is too old: give make PYTHON=python3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A corpus and its tokens; the pair, alike but for the stream of values; every checkpoint as a transformers folder; three
# kinds of evaluation; one verdict. Every command picks up where it was: a `make run` that was killed goes on.
run: .venv/.installed
	$(BIN)/python -m llm prepare stories --documents 30000 --train-tokenizer 1024 --out $(RUN)/store
	$(BIN)/python -m llm fit --config configs/stories_classic.yaml --resume auto
	$(BIN)/python -m llm fit --config configs/stories_values.yaml --resume auto
	$(BIN)/python -m llm export $(RUN)/classic --all
	$(BIN)/python -m llm export $(RUN)/values --all
	$(BIN)/python -m evals run --checkpoints $(RUN)/classic $(RUN)/values --tasks stories --limit 200
	$(BIN)/python -m evals ioi classic=$(RUN)/classic/$(LAST) values=$(RUN)/values/$(LAST)
	$(BIN)/python -m evals incontext $(RUN)/classic/$(LAST) $(RUN)/values/$(LAST) --store $(RUN)/store
	$(BIN)/python -m evals compare $(RUN)/classic $(RUN)/values --out $(RUN)/comparison

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

# The sbatch scripts on a Slurm cluster of two nodes, which is set up on this machine (apt-get, as root) and ended again.
test-slurm: .venv/.installed
	$(BIN)/python -m pytest -m slurm -rs tests/slurm

# The browser that opens the page of a comparison in `make test`, which skips that without one (apt-get, as root).
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		root="$$([ "$$(id -u)" = 0 ] || echo sudo --non-interactive)"; \
		$$root apt-get -qq update && \
		$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium >/dev/null; \
	} || echo "no Chromium or Chrome here, and apt-get cannot install one: no page is opened in the tests"
