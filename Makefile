# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs
# in .venv, and nothing outside the checkout.

VENV := .venv
BIN := $(VENV)/bin
IMAGE := celery-cluster
DOCKER := docker
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The first of these that is Python 3.11 or newer; or say: make PYTHON=/path/to/python3
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: help demo test coverage image test-docker chaos check wheel clean
.DEFAULT_GOAL := help

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/installed  ## count primes on a cluster of local processes
	@$(BIN)/cluster demo

test: $(VENV)/developing  ## run all tests
	$(BIN)/pytest --numprocesses 3 --dist worksteal $(TESTS)

# Not part of the tests: it has every process of a cluster write a file as it ends, and takes
# locks there that a fork may copy.
coverage: $(VENV)/developing  ## run all tests, and tell which lines they miss
	$(BIN)/pytest --numprocesses 3 --dist worksteal --cov --cov-report=term $(TESTS)

image:  ## build the image of managers and workers; BUILD="--build-arg BASE_IMAGE=…"
	DOCKER_BUILDKIT=1 $(DOCKER) build --tag $(IMAGE) --file worker_image/Dockerfile $(BUILD) .

test-docker: $(VENV)/developing image  ## run the tests that need a Docker engine
	ONLINE=docker CLUSTER_TEST_IMAGE=$(IMAGE) \
		$(BIN)/pytest -m docker $(TESTS)

chaos: $(VENV)/developing  ## kill and freeze workers and broker at random; SEED=7 KILLS=1000
	CHAOS_SEED=$(SEED) CHAOS_KILLS=$(KILLS) CHAOS_FAULTS="$(FAULTS)" CHAOS_REPORT=$(REPORT) \
		$(BIN)/pytest --quiet tests/chaos

check: $(VENV)/developing  ## lint, types, direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/developing  ## build the distribution into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:  ## remove the virtual environment and all that was built
	rm -rf $(VENV) dist build .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none is on PATH." \
		"Install it, or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module." \
		"On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'  # the first that knows dependency groups
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml
	@$(PIP) install --editable .
	@touch $@

$(VENV)/developing: $(VENV)/installed
	@$(PIP) install --group dev
	@touch $@
