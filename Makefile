# Everything runs in .venv, which the first call makes (see requirements/install.sh).
#   make demo PYTHON=python3.12       the Python to make it with
#   make test ARGS="-k compat -x"     more arguments for pytest

.PHONY: help install demo test test-long docs lint format lock clean
.DEFAULT_GOAL := help

VENV := .venv/bin
ARGS ?=
# Two processes, one for each core; each begins with one half of the tests, in order.
# For one process, and a debugger: ARGS="-n 0".
PYTEST := $(VENV)/python -m pytest -n 2 --dist worksteal -rs --durations=30 --durations-min=5

help:
	@echo "make demo       train plain and self-distilled detectors on generated pictures"
	@echo "make test       the tests (under 10 minutes on two cores)"
	@echo "make test-long  the tests that take longer (under 40 minutes)"
	@echo "make docs       the site of the documentation, in output/docs; links are checked"
	@echo "make lint       ruff: lint and format check"
	@echo "make format     ruff: fix and format"
	@echo "make lock       pin requirements/requirements.in into requirements/requirements.txt"
	@echo "make clean      remove .venv and what was generated"

install:
	@PYTHON="$(PYTHON)" requirements/install.sh

demo: install
	@echo "demo: starting"
	@$(VENV)/python tools/demo.py $(ARGS)

test: install
	@$(PYTEST) -m "not long" $(ARGS)

test-long: install
	@$(PYTEST) -m long $(ARGS)

docs: install
	@$(VENV)/python -m sphinx --fail-on-warning --keep-going -q -b html docs output/docs
	@echo "written: output/docs/index.html"

lint: install
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .

format: install
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

lock: install
	@.venv/bootstrap/bin/uv pip compile --quiet --universal --python-version 3.10 --upgrade \
		--custom-compile-command "make lock" --output-file requirements/requirements.txt \
		requirements/requirements.in

clean:
	rm -rf .venv output build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
