# `make install` sets up .venv to run; `make run` is the tutorial: the product's own commands, in order; `make test` sets
# up .venv for development too; CI also runs the slow tests, `make test-all`.
PYTHON ?= python3
BIN := .venv/bin

RUN := runs/stories

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install run study test test-all test-slurm browser lint site
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is too old: give make PYTHON=python3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.developing: .venv/.installed
	$(PIP) -e '.[dev]'
# In a folder of its own, which one test reads: transformers imports torchao wherever it can, in every process.
	$(PIP) --no-deps --upgrade --target .venv/torchao torchao
	touch $@

install: .venv/.installed

# A corpus and its tokens; a study of twelve small runs, with and without the value stream and a null arm, four seeds each;
# the last steps as transformers folders; three kinds of evaluation; one verdict. Every command resumes: repeat `make run`
# after an interruption.
run: .venv/.installed
	$(BIN)/python -m llm prepare stories --documents 30000 --train-tokenizer 1024 --out $(RUN)/store
	$(BIN)/python -m llm study run configs/studies/stories.yaml --jobs 2
	$(BIN)/python -m llm export $(RUN)/w64/classic-* $(RUN)/w64/values-*
	$(BIN)/python -m evals run $(RUN)/w64/*/exports/* --tasks stories --limit 200
	$(BIN)/python -m evals ioi classic=$$(echo $(RUN)/w64/classic-*/exports/* | tr ' ' ,) \
		values=$$(echo $(RUN)/w64/values-*/exports/* | tr ' ' ,)
	$(BIN)/python -m evals incontext $(RUN)/w64/*/exports/* --store $(RUN)/store
	$(BIN)/python -m evals compare $(RUN)/w64/classic-* $(RUN)/w64/values-* --out $(RUN)/comparison

# 72 small runs over four sizes, three seeds and two budgets, two at once, and the verdict. Resumes like `make run`;
# docs/study.md.
study: .venv/.installed
	$(BIN)/python -m llm prepare stories --documents 30000 --train-tokenizer 1024 --out $(RUN)/store
	$(BIN)/python -m llm study run configs/studies/toy.yaml --jobs 2
	$(BIN)/python -m evals study configs/studies/toy.yaml --out runs/studies/toy/verdict

lint: .venv/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

# The documentation as a site in site/; a broken link is an error.
site: .venv/.installed
	$(PIP) -e '.[site]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slurm and not slow'

test-all: lint
	$(BIN)/python -m pytest -n 3 --dist worksteal

# The sbatch scripts on a two-node Slurm cluster that the tests set up on this machine (apt-get, as root) and stop again.
test-slurm: .venv/.developing
	$(BIN)/python -m pytest -m slurm -rs tests/slurm

# A browser to open a comparison's page in `make test` (apt-get, as root); without one those tests skip.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		root="$$([ "$$(id -u)" = 0 ] || echo sudo --non-interactive)"; \
		$$root apt-get -qq update && \
		$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium >/dev/null; \
	} || echo "no Chromium or Chrome here, and apt-get cannot install one: no page is opened in the tests"
