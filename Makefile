# One command runs the main job (make demo), one runs every test (make test).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.runs
READY  := $(VENV)/.ready

.PHONY: demo test test-fast check lab lab-deep lab-deps guests dist clean help

help:            ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST)

$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "xenpv needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(READY): $(RUNS) requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: $(RUNS)    ## the main job: a PV domain of 600 GiB built, saved, verified and live-migrated on a model of Xen
	$(BIN)/xenpv demo

check: $(READY)  ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-fast: $(READY) ## everything that needs no hypervisor and no browser
	$(BIN)/pytest -q -n auto -m 'not lab and not browser'

test: check guests ## everything, on real Xen too
	$(BIN)/python -m lab fetch
	$(BIN)/pytest -q -n auto -m 'not lab'
	$(BIN)/pytest -q -m 'lab and not deep'

guests:          ## the litmus guest kernel
	$(MAKE) --no-print-directory -C guests/litmus

lab: $(READY) guests ## the tests on real Xen only
	$(BIN)/python -m lab fetch
	$(BIN)/pytest -q -m 'lab and not deep'

lab-deep: $(READY) guests ## on real Xen: everything on every version, 600 GiB too (more than an hour)
	$(BIN)/python -m lab fetch
	$(BIN)/pytest -q -m lab

lab-deps: $(RUNS) ## install the programs that the lab needs (says what it does)
	$(BIN)/python -m lab deps

dist: $(READY)   ## wheel and source distribution
	$(BIN)/python -m build --no-isolation

clean:           ## what was built here; never the lab's cache
	rm -rf $(VENV) dist build guests/*/build
