# make demo: train on handwritten digits. make test: run the tests. Both need Python (3.11 to 3.13), pip and make alone.
# make test-all: the long tests and those of the CUDA kernels' code, too. make docs: the documentation, in build/docs/html.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# setuptools warns of every editable installation
PIP_INSTALL := PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint docs bench clean

demo: $(VENV)/.installed
	$(BIN)/gpubackprop train digits --epochs 40 --out demo --overwrite

test: $(VENV)/.installed-dev
	@echo "make test: about 10 minutes on two cores, less once the kernels are compiled"
	@start=$$(date +%s); $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"; status=$$?; \
	echo "make test: $$(($$(date +%s) - start)) s"; exit $$status

test-all: test
	@echo "make test-all: about 20 minutes more on two cores"
	@start=$$(date +%s); $(MAKE) --no-print-directory $(VENV)/.installed-dev-cuda && \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or compilers"; status=$$?; \
	echo "make test-all: $$(($$(date +%s) - start)) s more"; exit $$status

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy and import-linter see a package as it is installed: kernels/ and bench/ inside gpubackprop/
	rm -rf build/typed && mkdir -p build/typed && cp -r gpubackprop build/typed && cp -r kernels bench build/typed/gpubackprop
	cd build/typed && $(abspath $(BIN))/mypy --strict --config-file ../../pyproject.toml -p gpubackprop
	cd build/typed && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache ../../pyproject.toml

# warnings are errors: a link, an example or a doctest that fails, too
docs: $(VENV)/.installed-docs
	MPLBACKEND=agg $(BIN)/sphinx-build -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html
	MPLBACKEND=agg $(BIN)/sphinx-build -q -W --keep-going -b doctest -d build/docs/doctrees docs build/docs/doctest
	@echo "make docs: build/docs/html/index.html"

bench: $(VENV)/.installed-dev
	$(BIN)/gpubackprop bench

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable . --group dev
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev-cuda: pyproject.toml | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable . --group dev-cuda
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable . --group docs
	touch $@ $(VENV)/.installed

clean:
	rm -rf docs/gallery docs/_made docs/sg_execution_times.rst
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
