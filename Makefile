# Everything runs in virtual environments inside the checkout. `make help` lists the targets.

# The first Python on the path that is new enough; another one: `make setup PYTHON=/path/to/python`
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
OLDEST := .venv-oldest
PIP_INSTALL := -m pip install --disable-pip-version-check

PRESET ?= cpu
PYTEST_ARGS ?= -q --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup suites lint format test test-oldest demo train-tiny build clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv with all that development needs (about 6 GB)

# Only a changed list of dependencies installs again
$(VENV)/.installed: setup.cfg pyproject.toml
	@test -x $(VENV)/bin/python -o -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python" >&2; exit 1; }
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[dev]"
	touch $@

suites: setup ## Fetch transformers' own test suites for the installed version
	$(VENV)/bin/python tests/common/fetch_transformers_tests.py

lint: setup ## Check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup ## Fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint suites ## Check style and run the tests; PYTEST_ARGS chooses what and how
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.installed ## Run the tests with the oldest versions that setup.cfg allows
	$(OLDEST)/bin/python tests/common/fetch_transformers_tests.py
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS)

# `name>=version` in setup.cfg becomes the constraint `name==version`
$(OLDEST)/.installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make test-oldest PYTHON=/path/to/python" >&2; exit 1; }
	$(OLDEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(OLDEST)
	sed -n 's/^ *\([A-Za-z0-9_.-]*\)>=\([0-9.]*\)$$/\1==\2/p' setup.cfg | sort -u > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) --constraint $(OLDEST)/constraints.txt --editable ".[test]"
	touch $@

demo: setup ## Answer a question about a picture
	$(VENV)/bin/python -m examples.demo

train-tiny: setup ## Train a tiny model from nothing; PRESET=cpu or gpu
	$(VENV)/bin/python -m training.train_tiny --preset $(PRESET)

build: setup ## Build the wheel into dist/ and check that it holds the package alone
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel
	rm -rf build
	! $(VENV)/bin/python -m zipfile --list dist/*.whl | tail -n +2 | grep -v '^modeling_llava_hr[/-]'

clean: ## Remove environments, caches and build products
	rm -rf $(VENV) $(OLDEST) .cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
