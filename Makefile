# `make demo` and `make test` set everything up in .venv by themselves: python3 (with venv), g++ and make suffice.
# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*)

.PHONY: help demo test full full-tests check described fuzz soak mutants parity peers full-grid docs wheel clean

help: ## what each target does (this list)
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: .venv/.installed ## text from the embedded model, plain and elastic, and a table of simulated hardware
	$(BIN)/elmoe demo

# Quick tier: at most 4 minutes on 2 cores. Two processes, a file of tests in one: fixtures of a file are made once.
JOBS ?= 2
test: .venv/.test ## quick tier of tests: no PyTorch, network or GPU
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# Full tier: hours.
full: test full-tests full-grid described parity docs ## full tier: test, full-tests, full-grid, described, parity and docs

full-tests: .venv/.test ## the cases that the quick tier leaves out (tests marked `full`)
	$(BIN)/python -m pytest -m full --numprocesses $(JOBS) --dist loadfile

check: .venv/.check ## lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

parity: .venv/.parity build/templates build/tokenizers ## comparison with transformers (installs PyTorch)
	$(BIN)/python -m pytest tests/parity -s

# Real chat templates of other projects, to render as transformers does.
build/templates:
	$(BIN)/python tests/parity/fetch_templates.py $@

build/tokenizers:
	$(BIN)/python tests/parity/fetch_tokenizers.py $@

# The whole losslessness grid; `make test` runs a sample of it.
full-grid: .venv/.test ## the whole losslessness grid and 1,000 random schedules
	$(BIN)/python -m tests.lossless
	$(BIN)/python -m tests.schedules --count 1000
	$(BIN)/python -m tests.schedules --count 300 --windows

# `make fuzz FUZZ_SECONDS=600` for less; inputs that fail are kept in build/fuzz.
FUZZ_SECONDS ?= 3600
fuzz: .venv/.test ## an hour of changed files through all readers
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

# Schemathesis, from the server's own OpenAPI description.
described: .venv/.described ## requests that the server's description allows, and answers as it says
	$(BIN)/python -m tests.server.described

.venv/.described: .venv/.test
	$(BIN)/python -m pip install --quiet "schemathesis>=4"
	touch $@

# Twice as many clients as a server takes, some of which leave; `make soak SOAK_SECONDS=300` for less.
SOAK_SECONDS ?= 1800
soak: .venv/.test ## half an hour of a server at twice its capacity
	$(BIN)/python -m tests.server.soak --seconds $(SOAK_SECONDS)

# Hours; results are kept in build/mutants, and a run that was stopped goes on.
mutants: .venv/.mutants ## a sample of changes of the source, each of which a test must notice
	$(BIN)/python -m tools.mutants

.venv/.mutants: .venv/.test
	$(BIN)/python -m pip install --quiet "coverage>=7.10"
	touch $@

# llama.cpp, to compare with (about 16 minutes, once).
peers: .venv/.installed ## build llama.cpp for the benchmarks
	bench/build_llama.sh build/peers

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("elmoe needs Python 3.11 or newer: make demo PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@command -v $${CXX:-g++} >/dev/null || { echo "elmoe needs a C++20 compiler: install g++, or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# Installed in place: Python files take effect at once, a change of native code rebuilds.
.venv/.installed: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "nanobind>=2.9"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[sim,server,chat]"
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install --quiet "httpx>=0.27" "hypothesis>=6.100" "llguidance>=1.0" "openai>=1.60" \
	  "pytest>=8" "pytest-xdist>=3.6"
	touch $@

.venv/.check: .venv/.test
	$(BIN)/python -m pip install --quiet "import-linter>=2.1" "mypy>=1.11" "ruff>=0.9" types-PyYAML
	touch $@

# torch first: with it in place nothing else pulls another build.
.venv/.parity: .venv/.test
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet "safetensors>=0.5" "transformers>=5"
	touch $@

# In an environment of its own: the site's tools need nothing of the tests.
docs: build/docs-venv/.installed .venv/.installed ## build the documentation site in build/site
	$(BIN)/python -m tools.cli_reference --check
	build/docs-venv/bin/mkdocs build --strict

build/docs-venv/.installed: pyproject.toml
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet "mkdocs>=1.6,<2" "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27" "ruff>=0.9"
	touch $@

wheel: .venv/bin/python ## source distribution and wheel in dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean: ## remove the environment and what was built
	rm -rf .venv build dist
