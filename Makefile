# `make quick` runs every experiment on embedded data; `make test` lints and tests.
# Both make .venv when it is missing or older than requirements.txt.

PYTHON ?= python3

.PHONY: quick test

quick: .venv/ready
	.venv/bin/python -m shared_utils.reproduce --quick

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch .venv/ready
