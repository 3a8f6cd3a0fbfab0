# Every target sets itself up on a fresh machine: Python 3.12+ is looked for, .venv made, jaxgen installed.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: help setup demo test lint format goldens notebooks clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv and install jaxgen with everything for development

$(READY): pyproject.toml constraints.txt scripts/find_python.sh
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
		python=$$(scripts/find_python.sh) || exit 1; \
		echo "Setting up $(VENV) with $$($$python --version) (once; a minute or two)"; \
		$$python -m venv --clear $(VENV) || exit 1; \
	fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: setup  ## draw emoji with the shipped models, compare four samplers, do sums, train for a minute
	@$(BIN)/python -m train.demo

test: setup  ## run the tests (CPU)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests

lint: setup  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: setup  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

goldens:  ## rewrite tests/goldens with diffusers (needs Python 3.11 for torch's CPU build)
	@goldens/make.sh

notebooks: setup  ## execute the notebooks and keep their pictures
	@$(BIN)/python scripts/execute_notebooks.py

clean:  ## remove .venv and caches; runs and pictures stay
	@rm -rf $(VENV) .goldens-venv .pytest_cache .ruff_cache .hypothesis .jaxgen_cache
