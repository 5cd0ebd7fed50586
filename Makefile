PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Installed where torch, as its CPU builds, brings none.
TRITON ?= triton==3.9.0; platform_system == 'Linux'
RANKS  ?= 2
# Processes that run tests without ranks.
WORKERS ?= 2
BIN    := .venv/bin
STAMP  := .venv/.installed$(if $(LATEST),-latest)
VERSIONS := $(if $(LATEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt)

.PHONY: help venv demo base test test-slow bench bench-gpu lint docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv, post-train the tiny base with UNO on $(RANKS) ranks, draw samples"
	@echo "make test       the test suite          make test-slow  with the long fault and parity tables"
	@echo "make bench      what UNO costs over flow matching, on this machine, 3 minutes"
	@echo "make bench-gpu  kernels and BAGEL-7B's size on a CUDA machine, 7.5 + 3.5 minutes; PART=1, OUT=DIR;"
	@echo "                REHEARSE=1: the same program on a CPU, at most 3 minutes"
	@echo "make base       train the tiny base again, from nothing"
	@echo "make lint       ruff and mypy           make docs       regenerate the settings table"
	@echo "make site       build the documentation with its API reference into site/"
	@echo "make venv       only install            make clean      remove caches and build output"
	@echo "LATEST=1 with any of these: the newest dependencies instead of the tested ones of constraints.txt"

venv: $(STAMP)

# The stamps are removed first and one is written last: a half-finished install is repeated, never trusted, and so is one of
# other versions. torch goes first and pinned, because the dependencies would otherwise choose a build of their own.
$(STAMP): setup.py constraints.txt
	@rm -f .venv/.installed*
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check "$(TRITON)"
	$(BIN)/python -m pip install --disable-pip-version-check $(VERSIONS) "$(TORCH)" -e ".[test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny --overwrite
	@echo "Open in runs/tiny: samples.png (base above UNO-trained), curves.png (each loss over steps), summary.md"

base: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny_base

# Tests without ranks in several processes, then those that start ranks, alone: they measure times. Both always run.
test test-slow: $(STAMP)
	@failed=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not distributed$(UNLESS_SLOW)" || failed=1; \
	$(BIN)/python -m pytest -m "distributed$(UNLESS_SLOW)" || failed=1; \
	exit $$failed
test: UNLESS_SLOW = $() and not slow

bench: $(STAMP)
	$(BIN)/python -m benchmarks suite cpu

# With the interpreter at hand where there is no .venv: a CUDA machine may have its torch installed already.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks suite gpu \
		$(if $(PART),--part $(PART)) $(if $(REHEARSE),--rehearse) $(if $(OUT),--out $(OUT))

lint: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(STAMP)
	$(BIN)/python -m uno_ds.recipe --write-docs

.PHONY: site
SITE_STAMP := .venv/.installed-site

# Builds without a network; only the installation of mkdocs needs one.
site: $(SITE_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean
	@echo "Open site/index.html. The search needs a server: $(BIN)/python -m http.server -d site"

$(SITE_STAMP): $(STAMP)
	@rm -f $(SITE_STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(VERSIONS) "$(TORCH)" -e ".[docs]"
	@touch $(SITE_STAMP)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
