# `make demo` and `make test` set everything up in .venv by themselves: python3 (with venv), g++ and make suffice.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*)

.PHONY: demo test check parity peers full-grid clean

demo: .venv/.installed
	$(BIN)/elmoe demo

test: .venv/.test
	$(BIN)/python -m pytest

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

parity: .venv/.parity build/templates
	$(BIN)/python -m pytest tests/parity -s

# Real chat templates of other projects, to render as transformers does.
build/templates:
	$(BIN)/python tests/parity/fetch_templates.py $@

# The whole losslessness grid; `make test` runs a sample of it.
full-grid: .venv/.test
	$(BIN)/python -m tests.lossless
	$(BIN)/python -m tests.schedules --count 1000

# llama.cpp, to compare with (about 16 minutes, once).
peers: .venv/.installed
	bench/build_llama.sh build/peers

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# Installed in place: Python files take effect at once, a change of native code rebuilds.
.venv/.installed: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "nanobind>=2.9"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install --quiet "hypothesis>=6.100" "pytest>=8"
	touch $@

.venv/.check: .venv/.test
	$(BIN)/python -m pip install --quiet "import-linter>=2.1" "mypy>=1.11" "ruff>=0.9" types-PyYAML
	touch $@

# torch first: with it in place nothing else pulls another build.
.venv/.parity: .venv/.test
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet "safetensors>=0.5" "transformers>=5"
	touch $@

clean:
	rm -rf .venv build dist
