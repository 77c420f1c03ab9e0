# make run    make .venv, install, run the main job on the embedded world of scenes, print the report's path
# make test   the whole test suite
# make check  format, lint, types and the rules of the architecture
# make bench  the measurements of docs/, one script each
# make docs   the documentation as a site, in site/
#
# PYTHON (3.11 or newer) makes the environment once; it is brought up to date only when pyproject.toml or
# constraints.txt change. `make run RECIPE=scenes/expo_lora ARGS="--set seed=1"` runs something else.

PYTHON ?= python3
RECIPE ?= scenes/expo
PROCESSES ?= auto
ARGS ?=
VENV := .venv
READY := $(VENV)/.installed
CODE := src worlds tests benchmarks examples docs/theme setup.py

.PHONY: run test check bench docs install
.DEFAULT_GOAL := run

run: $(READY)
	@$(VENV)/bin/diffexpo run $(RECIPE) --processes $(PROCESSES) $(ARGS)

# Each worker computes with one thread, so that as many tests run at once as there are cores (at most 4, because of
# memory), and takes one file after the other in the order of tests/conftest.py, long ones first. The many processes
# that tests start share what Python has compiled, even if the environment says otherwise.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(READY)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python "$$script" $(ARGS); done

# Nothing is fetched, neither to build the site nor to read it; open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

# Lines have at most 110 columns; in tests and benchmarks as far as the formatter can wrap them.
check: $(READY)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/architecture

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("diffexpo needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,label,docs]'
	@touch $(READY)
