# Two commands do everything: make demo, make test. Each makes its own virtual environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint bench docs clean

demo: $(VENV)/demo.stamp
	$(BIN)/puna run chocollama --scale demo --out runs/chocollama

test: $(VENV)/test.stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/test.stamp
	@for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/demo.stamp
	$(BIN)/python -m puna.run.docs

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("puna needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing puna and its pinned dependencies (about 1.5 GB on disk, a minute or two)"
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	touch $@

# llama-cpp-python is built from source: without a C compiler the tests that open GGUF files in it are skipped.
$(VENV)/test.stamp: pyproject.toml constraints.txt $(VENV)/demo.stamp
	@echo "installing the test dependencies (llama-cpp-python is compiled: several minutes)"
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	$(PIP) install --constraint constraints.txt llama-cpp-python \
		|| echo "llama-cpp-python could not be built here: its tests will be skipped"
	@$(BIN)/python -m tests.serve.chromium \
		|| echo "no Chromium could be had here: the tests of the web page will be skipped"
	touch $@
