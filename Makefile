# The commands of development. `make help` lists them.
.PHONY: help install test quick lint format docs serve lock

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install:  ## install the package, tests, docs, and the checks before each commit
	pip install -e '.[test,docs]' -c .ci/requirements.lock
	pip install pre-commit && pre-commit install

test:  ## all tests, about 15 minutes on two cores
	pytest

quick:  ## the tests that need no minutes, about 2 minutes
	pytest -m "not slow"

lint:  ## what CI checks besides tests
	ruff check .
	ruff format --check .
	pyright

format:  ## format the code, and mend what can be mended
	ruff check --fix .
	ruff format .

docs:  ## build the pages into build/site, with broken links as errors
	python -m scripts.reference_pages
	mkdocs build --strict

serve:  ## the pages in a browser, rebuilt at each change
	mkdocs serve

lock:  ## pin the newest versions that fit, for Python 3.11 and later
	pip install uv
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate -o .ci/requirements.lock
