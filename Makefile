# Everything one does with this project. `make` alone lists it.
# Each target first makes .venv, from pyproject.toml and constraints.txt, unless it is there and newer than both.

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c '' 2>/dev/null && { echo $$python; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# One process for each processor, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Threads that wait for one another sleep: where something else runs too, spinning ones can take ten times as long.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all test-torch zoo zoo-structure gate gate-full lint types check docs dist bench bench-smoke gpu clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(READY) ## Make .venv from pyproject.toml and constraints.txt

# The stamp is the last thing written: an installation that broke off half-way is begun again from nothing.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "No Python found. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed." >&2; \
		echo "Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version): several gigabytes, a few minutes"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) hatchling editables setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m convbn_fx build || echo "Without it everything works, slower, and is tested so"
	@touch $@

demo: $(READY) ## Fuse seven real architectures; compare gradients, memory and time
	@$(BIN)/python -m bench.demo

test: $(READY) ## Run the fast tests
	@$(PYTEST)

test-slow: $(READY) ## Run the slow tests
	@$(PYTEST) -m slow

test-all: test test-slow ## Run every test

# The oldest version that is still to be had as a build for CPUs alone. Its torchvision is not, so that the tests that
# need one are left out; pytest's first lines name them. What an older PyTorch deprecates of itself is no
# error.
TORCH := 2.13.0
TORCH_TESTS := tests/test_torch.py tests/test_properties.py tests/functional tests/kinds tests/fx

test-torch: ## Test the core on an older PyTorch, with nothing else installed: make test-torch TORCH=2.13.0+cpu
	@rm -rf build/torch && $(PYTHON) -m venv build/torch
	@grep -E '^(editables|hatchling|hypothesis|ninja|pydot|pytest|setuptools)' constraints.txt >build/torch/constraints.txt
	@build/torch/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/torch/constraints.txt \
		'torch==$(TORCH)' numpy hypothesis pydot pytest pytest-timeout pytest-xdist hatchling editables ninja setuptools
	@build/torch/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	@PATH="$(CURDIR)/build/torch/bin:$$PATH" build/torch/bin/python -m convbn_fx build || echo "Tested on plain operations"
	@OMP_NUM_THREADS=1 build/torch/bin/python -m pytest --numprocesses auto --dist worksteal \
		-W ignore::DeprecationWarning -W ignore::FutureWarning $(TORCH_TESTS)

# A process for each processor, and in each model's process one thread: the same sums in the same order everywhere.
SWEEP := $(BIN)/convbn-fx sweep
MEASURED := build/gate

zoo: $(READY) ## Measure all of timm and torchvision in numbers, go on where it stopped, and write the page (hours)
	@$(SWEEP) --suite timm --suite torchvision --level numeric --max-params 1e8 --resume \
		--out bench/results/zoo.csv --html docs/zoo.html

gate: $(READY) ## Hold the structure of all but the deepest architectures, and a sample in numbers, to bench/expected
	@$(call held,structure,structure)
	@$(call held,numeric,sample)

gate-full: gate ## The same with the deepest ones, and one model of every family in numbers
	@$(call held,structure,deep)
	@$(call held,numeric,families)

# $(call held,LEVEL,NAME): measures the models of the baseline NAME.csv anew, and judges them by it.
define held
mkdir -p $(MEASURED) && rm -f $(MEASURED)/$(2).csv && \
	$(SWEEP) --suite bench/expected/$(2).csv --level $(1) --out $(MEASURED)/$(2).csv >$(MEASURED)/$(2).txt && \
	$(BIN)/convbn-fx gate $(MEASURED)/$(2).csv --expected bench/expected/$(2).csv
endef

zoo-structure: $(READY) ## Count the pairs of every timm architecture, run and fused (half an hour)
	@$(BIN)/python -m bench.tools.structure

lint: $(READY) ## Check style, formatting and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

types: $(READY) ## Check the types
	@$(BIN)/mypy

check: lint types test ## Lint, types and fast tests: what must pass before a commit

# Nobody needs it to use or to test the library, so it is installed when it is first built.
DOCS_READY := $(VENV)/.ready-docs

$(DOCS_READY): $(READY)
	@$(PIP_INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(DOCS_READY) ## Build the documentation into build/site, where a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "To read it: $(BIN)/python -m http.server --directory build/site"

dist: $(READY) ## Build the wheel and the source archive into dist
	@$(BIN)/python -m hatchling build --clean --directory dist

# The names are in one place: bench/experiments.
EXPERIMENTS = $(shell $(BIN)/python -c 'from bench.experiments import EXPERIMENTS; print(*EXPERIMENTS)')

bench: $(READY) ## Run every experiment, into bench/results and docs/benchmarks.md (two hours)
	@for name in $(EXPERIMENTS); do \
		env --unset OMP_WAIT_POLICY $(BIN)/python -m bench $$name --json bench/results/$$name.json || exit 1; done
	@$(BIN)/python -m bench.tools.page

# A GPU is most often on another machine, and lent for minutes: each part ends within nine of them.
PART ?= eager
GPU_PYTHON ?= $(BIN)/python

gpu: ## Test and measure on a GPU, a part at a time: make gpu PART=eager, graphs, compiled or tests [GPU_PYTHON=python3]
ifeq ($(PART),tests)
	@$(GPU_PYTHON) -m pytest -q tests/functional/test_cuda.py
else
	@$(GPU_PYTHON) -m bench gpu --device cuda --part $(PART) --seconds 3 --json bench/results/gpu-$(PART).json
endif

bench-smoke: $(READY) ## Run every experiment at toy size
	@$(BIN)/python -m bench.demo --smoke
	@for name in $(EXPERIMENTS); do $(BIN)/python -m bench $$name --smoke || exit 1; done

clean: ## Remove .venv, caches and build results
	@rm -rf $(VENV) build dist site htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
