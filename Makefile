# make demo: train on handwritten digits. make test: run the tests. Both need Python (3.11 to 3.13), pip and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/gpubackprop train --data digits --epochs 40 --out demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy sees a package as it is installed: kernels/ and bench/ inside gpubackprop/
	rm -rf build/typed && mkdir -p build/typed && cp -r gpubackprop build/typed && cp -r kernels bench build/typed/gpubackprop
	cd build/typed && $(abspath $(BIN))/mypy --strict --config-file ../../pyproject.toml -p gpubackprop

bench: $(VENV)/.installed-dev
	$(BIN)/gpubackprop bench

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable ".[sklearn]" --group dev
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
