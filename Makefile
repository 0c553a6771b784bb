# Two commands from a fresh clone: `make demo` and `make test`. Both make .venv and install into it if need be.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS) # tensors are tiny: threads would wait for each other

# mypy can't follow the folder mapping of an editable install, so it reads an installed copy
lint: $(BIN)/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/setup.cfg -p peft_psr
