# From a fresh clone: `make demo` and `make test`; `make check` before each commit, in a minute and a half on 2 idle
# cores. All make .venv and install into it if need be.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# what `make test-versions` runs in each of its two environments
ADAPTER_TESTS := $(foreach name,upstream caches odd_calls call_state adapter adapter_files adapter_mistakes hooks modes \
  modes_training layouts compile mixed_batches beside_lora many_traits sharing peft_checks trainer train_several chat \
  chat_command llm_judge local_sampler ifeval,$(shell find tests -name test_$(name).py))

.PHONY: demo test fast check test-versions lint

$(BIN)/psr: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval]"
	touch $(BIN)/psr

$(BIN)/pytest: $(BIN)/psr
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(BIN)/pytest

demo: $(BIN)/psr
	$(BIN)/psr demo $(ARGS)

test: $(BIN)/pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS) # tensors are tiny: threads would wait for each other

# the oldest versions that pyproject.toml admits, then the newest of everything but torch, whose CPU build is large
# enough; docs/versions.md tells what came of it
test-versions:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(ADAPTER_TESTS) $(ARGS)
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(shell grep ^torch== constraints.txt)
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  $(shell grep ^torch== constraints.txt) --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(ADAPTER_TESTS) $(ARGS)

# mypy and import-linter can't follow the folder mapping of an editable install, so they read an installed copy
lint: $(BIN)/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && $(CURDIR)/$(BIN)/lint-imports --no-logo --no-cache --config $(CURDIR)/pyproject.toml
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/setup.cfg \
	  --cache-dir $(CURDIR)/.mypy_cache -p peft_psr

fast: $(BIN)/pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not long" $(ARGS)

check: $(BIN)/pytest # mypy keeps one core busy, and the tests the other
	$(MAKE) --jobs 2 lint fast
