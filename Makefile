# Two commands do all the set-up: `make repro` and `make test`. Everything lives in .venv; nothing needs activating.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
INSTALLED := $(VENV)/installed
# DVC runs whichever `python` comes first on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint clean
repro: $(INSTALLED)
	@$(VENV)/bin/dvc repro
	@echo && cat reports/verdict.txt && echo "parameters, curves and models of every run: $(VENV)/bin/cosface ui"

test: lint
	@OMP_NUM_THREADS=1 pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	@ruff check . && ruff format --check . && pyrefly check

$(INSTALLED): pyproject.toml constraints.txt stages/align/kernels.cpp
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11, 3.12 or 3.13 on PATH (or PYTHON=/path/to/python)"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: about 2 GB on a machine without a GPU, 7 GB with"
	@$(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@# Bytecode, by all cores, and also where PYTHONDONTWRITEBYTECODE is set, as in many containers: each process would
	@# compile torch and MLflow for itself otherwise. What fails to compile is for another version of Python.
	@$(VENV)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

clean:
	rm -rf $(VENV)
