PYTHON ?= python3
TORCH  ?= torch==2.13.0
RANKS  ?= 2
BIN    := .venv/bin
STAMP  := .venv/.installed
DOCS_STAMP := .venv/.installed_docs

.PHONY: help venv demo base test test-slow bench bench-gpu lint docs site clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv, post-train the tiny base with UNO on $(RANKS) ranks, draw samples"
	@echo "make test       the test suite          make test-slow  with the long fault and parity tables"
	@echo "make bench      what UNO costs over flow matching, on this machine, 3 minutes"
	@echo "make bench-gpu  the same at BAGEL-7B size on a CUDA machine, 9 minutes; QUICK=1: 3 minutes"
	@echo "make base       train the tiny base again, from nothing"
	@echo "make lint       ruff                    make docs       regenerate the settings table"
	@echo "make site       build the documentation with its API reference into site/"
	@echo "make venv       only install            make clean      remove caches and build output"

venv: $(STAMP)

# The stamp is removed first and written last: a half-finished install is repeated, never trusted. torch goes first
# and pinned, because the dependencies would otherwise choose a build of their own.
$(STAMP): setup.py
	@rm -f $(STAMP)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny
	@echo "Open in runs/tiny: samples.png (base above UNO-trained), curves.png (each loss over steps), summary.md"

base: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny_base

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m ""

bench: $(STAMP)
	$(BIN)/python -m benchmarks suite cpu

# With the interpreter at hand where there is no .venv: a CUDA machine may have its torch installed already.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks suite gpu $(if $(QUICK),--quick)

lint: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

docs: $(STAMP)
	$(BIN)/python -m uno_ds.recipe --write-docs

# Builds without a network; only the installation of mkdocs needs one.
site: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean --quiet
	@echo "Open site/index.html; the search needs a server: $(BIN)/python -m http.server -d site"

$(DOCS_STAMP): $(STAMP)
	@rm -f $(DOCS_STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[docs]"
	@touch $(DOCS_STAMP)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
