# Commands for people and for CI. All but `make gpu` and `make clean` set up .venv on first use and
# need Python >= 3.10 and a package index. `make gpu` uses $(PYTHON) and what is installed there.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo quick test test-all coverage mutants hf-suite compat clients tensorflow browser lint gpu bench clean

help:
	@echo "make demo      verify fused models against stock and time both, on this machine"
	@echo "make quick     the tests of what has changed, few of each"
	@echo "make test      the tests"
	@echo "make test-all  the tests, the slow ones too; DATA=FOLDER: and those that train on SST-2 and WNUT-17, found there"
	@echo "make hf-suite  Hugging Face's own tests, stock and fused, under three versions of transformers; slow"
	@echo "make compat    tests under each version of triton and transformers that is tried; slow"
	@echo "make clients   other people's packages over fused models, in environments of their own; slow"
	@echo "make tensorflow  what TensorFlow and transformers 4 have written, converted; slow"
	@echo "make browser   the page of fastbert explain, opened in a browser that pip brings"
	@echo "make coverage  branches of the library that make test runs"
	@echo "make mutants   plants faults one at a time: which test catches which"
	@echo "make lint      ruff and mypy"
	@echo "make gpu       GPU tests and benchmarks by what tests prove, with \$$(PYTHON) as it is: nothing is installed"
	@echo "make bench     the benchmarks on this machine, in .venv"
	@echo "make clean     remove .venv and what building left behind"

demo: $(INSTALLED)
	$(VENV)/bin/python examples/demo.py

quick: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --dist worksteal --quick

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --dist worksteal

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q --slow $(if $(DATA),--data $(DATA))

hf-suite: $(INSTALLED)
	$(VENV)/bin/python -m tests.compat.hf_suite $(ARGS)

compat: $(INSTALLED)
	$(VENV)/bin/python -m tests.compat.matrix $(ARGS)

clients: $(INSTALLED)
	$(VENV)/bin/python -m tests.compat.clients $(ARGS)

tensorflow: $(INSTALLED)
	$(VENV)/bin/python -m tests.compat.from_tensorflow $(ARGS)

browser: $(INSTALLED)
	$(VENV)/bin/python -m tests.compat.in_a_browser $(ARGS)

coverage: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --dist worksteal --cov=fastbert --cov-branch --cov-report=term-missing:skip-covered

mutants: $(INSTALLED)
	$(VENV)/bin/python -m tests.mutations

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/suite.py $(ARGS)

# What a red test covers is not timed. Goes on where it was stopped; ARGS='--only latency --minutes 5 --archive FOLDER'.
gpu:
	$(PYTHON) benchmarks/suite.py $(ARGS)

# The stamp is written last, so that an install that broke off is taken up again. torch comes first and by its exact
# version: asked for by a range, pip takes the newest, with gigabytes of CUDA packages this environment doesn't test.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastbert needs Python 3.10 or newer and '$(PYTHON)' is not it; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt $(TORCH)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
