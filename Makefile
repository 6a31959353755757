# Each target makes the environment it needs with .ci/venv and is quick the second time.
# To use another Python than python3: make test PYTHON=python3.12
PYTHON ?= python3

DEMO := .venv
TEST := .venv-test
NEXT := .venv-next

# Two processes, a file at a time: most tests compile on one core.
PYTEST := -m pytest -n 2 --dist loadfile -ra --durations=10
# What the second version pair runs: the tests of the library and its kernels, that is, every file
# that imports neither train nor convert. Tests that need torch skip there.
NEXT_TESTS = $(shell grep -LE '^ *(from|import) (train|convert)([. ]|$$)' tests/test_*.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-slow soak test-next lint format reference notebooks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo:  ## the main job in small: makes notes, pretrains in two phases, exports, fills masks
	@.ci/venv $(DEMO) train $(PYTHON)
	$(DEMO)/bin/python -m train pretrain --config demo

test:  ## every kind of check, few cases each: tests, then lint
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/python $(PYTEST) -m "not slow"
	@$(MAKE) --no-print-directory lint

# Here a missing Python 3.12 is no failure: the second pair is tested where it can be.
test-all: test test-slow  ## everything: whole matrices, soak tests, the second version pair
	@$(MAKE) --no-print-directory test-next CI=true

test-slow:  ## only what `make test` leaves out
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/python $(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: no test is marked slow

soak:  ## twenty trials of killing one of two hosts at a random step
	@.ci/venv $(TEST) test $(PYTHON)
	SOAK_TRIALS=20 $(TEST)/bin/python $(PYTEST) tests/test_hosts.py -k killed

test-next:  ## the library's tests on the newer jax and flax; needs Python 3.12 or newer
	@if python=$$(.ci/venv find 12); then \
	    .ci/venv $(NEXT) test "$$python" && \
	    $(NEXT)/bin/python $(PYTEST) -m "not slow" $(NEXT_TESTS); \
	else \
	    echo "test-next: found no Python 3.12 or newer, so the second version pair is not tested"; \
	    $(if $(CI),true,false); \
	fi

lint:  ## ruff, the format, the types
	@.ci/venv $(TEST) test $(PYTHON)
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
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

clean:  ## removes the environments and every cache
	rm -rf $(DEMO) $(TEST) $(NEXT) .venv-h100 build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
