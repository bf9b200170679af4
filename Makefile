# One command runs the main job (make demo), one runs every test (make test).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.runs
READY  := $(VENV)/.ready

.PHONY: demo test test-fast check lab lab-deep lab-deps guests docs dist clean help

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

demo: $(RUNS)    ## the main job: build, save, verify and live-migrate a PV domain of 600 GiB on a model of Xen
	$(BIN)/xenpv demo

check: $(READY)  ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-fast: $(READY) ## everything that needs no hypervisor and no browser
	$(BIN)/pytest -q -n auto -m 'not lab and not browser'

# Missing programs are installed where that asks for nothing. Otherwise all tests that can run do run, and this fails.
test: check docs ## everything, on real Xen too; installs missing programs, and says so
	@missing=0; $(BIN)/python -m lab deps || missing=1; \
	if [ $$missing = 0 ]; then \
	    export XENPV_TESTS=all; \
	    $(MAKE) --no-print-directory guests && $(BIN)/python -m lab fetch || exit 1; \
	fi; \
	$(BIN)/pytest -q -n auto -m 'not lab' && $(BIN)/pytest -q -m 'lab and not deep' || exit 1; \
	if [ $$missing = 1 ]; then echo "make test: not all tests ran, because programs are missing (see above)"; exit 1; fi

guests:          ## build the litmus guest kernel
	$(MAKE) --no-print-directory -C guests/litmus

lab: $(READY) guests ## the tests on real Xen only
	$(BIN)/python -m lab fetch
	$(BIN)/pytest -q -m 'lab and not deep'

lab-deep: $(READY) guests ## all tests on real Xen, each on every version, 600 GiB too (more than an hour)
	$(BIN)/python -m lab fetch
	$(BIN)/pytest -q -m lab

lab-deps: $(RUNS) ## install the programs that the lab and the tests need (says what it does)
	$(BIN)/python -m lab deps

docs: $(READY)   ## the documents as a site: build/docs/html/index.html
	$(BIN)/sphinx-build -q -W --keep-going -n -j auto -b html -d build/docs/doctrees docs build/docs/html
	@echo "The documents are in build/docs/html/index.html"

dist: $(READY)   ## wheel and source distribution
	$(BIN)/python -m build --no-isolation

clean:           ## remove what was built here, but not the lab's cache
	rm -rf $(VENV) dist build guests/*/build
