# Each target makes the environment it needs with .ci/venv and is quick the second time.
# To use another Python than python3: make test PYTHON=python3.12
PYTHON ?= python3

DEMO := .venv
TEST := .venv-test
NEXT := .venv-next

# Two processes, each a file at a time: most tests compile on one core.
PYTEST := -m pytest -n 2 --dist loadfile -ra --durations=10
QUICK := not slow and not matrix
# Tests marked `optimized` compile as users do; all others compile in other processes, where XLA
# optimizes little: tests/conftest.py.
pytest_twice = $(TEST)/bin/python $(PYTEST) -m "$(1) and not optimized" $(2) && \
    $(TEST)/bin/python $(PYTEST) -m "$(1) and optimized" $(2)
# The files that `make check` runs: half of all tests, in about 70 seconds of processor time.
CHECK_TESTS := $(patsubst %,tests/test_%.py, config configs corpora_sources corpora_text corpora_xml \
    data layout loss masking mixture optimizer packing scores synthetic task_files tasks)
# The files that run on the second version pair: those that import neither train nor convert, which
# are the tests of the library and its kernels. Tests that need torch skip there.
NEXT_TESTS = $(shell grep -LE '^ *(from|import) (train|convert)([. ]|$$)' tests/test_*.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo check test test-all test-slow test-matrix soak attack test-next lint format \
    reference notebooks release clean

help:  ## prints this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo:  ## runs the main job in small: writes notes, pretrains in two phases, exports, fills masks
	@.ci/venv $(DEMO) train $(PYTHON)
	$(DEMO)/bin/python -m train pretrain --config demo

check:  ## lints and runs the quick test files: the inner loop, under 90 seconds on two idle cores
	@$(MAKE) --no-print-directory lint
	$(TEST)/bin/python $(PYTEST) -m "$(QUICK) and not optimized" $(CHECK_TESTS)

test:  ## runs every kind of check with few cases each, then lints
	@.ci/venv $(TEST) test $(PYTHON)
	$(call pytest_twice,$(QUICK))
	@$(MAKE) --no-print-directory lint

# Here a missing Python 3.12 is no failure: the second pair is tested where it can be.
test-all: test test-slow test-matrix  ## runs everything: also the second version pair, where it can
	@$(MAKE) --no-print-directory test-next CI=true

test-slow:  ## runs long tests of their own kind: the documents, the notebooks, kills, packaging
	@.ci/venv $(TEST) test $(PYTHON)
	$(call pytest_twice,slow,--ignore tests/attack)

test-matrix:  ## runs every case of the matrices of which `make test` has some; CI leaves it out
	@.ci/venv $(TEST) test $(PYTHON)
	$(call pytest_twice,matrix,--ignore tests/attack)

soak:  ## kills one of two hosts at a random step, twenty times
	@.ci/venv $(TEST) test $(PYTHON)
	SOAK_TRIALS=20 $(TEST)/bin/python $(PYTEST) tests/test_hosts.py -k killed

attack: soak  ## attacks folders, files and runs: hostile inputs, full disks, hosts that differ
	$(TEST)/bin/python $(PYTEST) tests/attack

test-next:  ## runs the library's tests on the newer jax and flax; needs Python 3.12 or newer
	@if python=$$(.ci/venv find 12); then \
	    .ci/venv $(NEXT) test "$$python" && \
	    $(NEXT)/bin/python $(PYTEST) -m "$(QUICK)" $(NEXT_TESTS); \
	else \
	    echo "test-next: found no Python 3.12 or newer, so the second version pair is not tested"; \
	    $(if $(CI),true,false); \
	fi

lint:  ## checks style, format, the direction of imports, and types
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/lint-imports --no-logo --no-cache
	$(TEST)/bin/pyright

format:  ## rewrites the sources: import order, fixable lint, format
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/ruff check --fix
	$(TEST)/bin/ruff format

reference:  ## writes notebooks/guides/reference.md from the docstrings
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/python -m tests.make_reference

notebooks:  ## executes every notebook from its .py and rewrites the .ipynb, outputs included
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/python notebooks/execute.py

# Both are built from the checkout. The tests then build them again, install the wheel into an empty
# environment, and compare the version with CHANGELOG.md and CITATION.cff.
release:  ## builds and checks the sdist and the wheel, and prints how to upload them
	@.ci/venv $(TEST) test $(PYTHON)
	rm -rf dist
	$(TEST)/bin/python -m build
	$(TEST)/bin/python -m twine check --strict dist/*
	$(TEST)/bin/python -m pytest -q tests/test_packaging.py tests/test_layout.py
	@echo "Ready. Date the version in CHANGELOG.md, tag it, and upload it with:"
	@echo "  $(TEST)/bin/python -m twine upload dist/*"

clean:  ## removes the environments and every cache
	rm -rf $(DEMO) $(TEST) $(NEXT) .venv-h100 build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
