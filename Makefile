PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Installed where torch, as its CPU builds, brings none.
TRITON ?= triton==3.9.0; platform_system == 'Linux'
RANKS  ?= 2
# Processes that run tests.
WORKERS ?= 2
# `make test TORCH=torch==X` has an environment of its own, beside the one that is worked in.
TESTED := $(if $(filter test test-slow,$(MAKECMDGOALS)),$(if $(findstring command,$(origin TORCH)),$(TORCH)))
VENV   := .venv$(if $(TESTED),-$(subst ==,-,$(TESTED)))
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed$(if $(LATEST),-latest)
VERSIONS := $(if $(LATEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt)

# The base, a flow-only run and the UNO run of the demo, side by side.
INSPECTED := tiny_base runs/tiny_flow runs/tiny

.PHONY: help venv demo inspect base eval test test-slow test-nodes bench bench-gpu lint docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv, post-train the tiny base with UNO on $(RANKS) ranks, draw samples"
	@echo "make inspect    look inside the base, a flow-only run and the demo's run: runs/inspection/report.html"
	@echo "make test       the test suite          make test-slow  with the long fault and parity tables"
	@echo "make test-nodes training over several hosts made of network namespaces, and Slurm on them; as root"
	@echo "make test TORCH=torch==2.15.0           with that torch, installed into .venv-torch-2.15.0"
	@echo "make eval       how well the tiny base and the demo's model draw the embedded scenes"
	@echo "make bench      what UNO costs over flow matching, on this machine, 3 minutes"
	@echo "make bench-gpu  kernels and BAGEL-7B's size on a CUDA machine, 7.5 + 3.5 minutes; PART=1, OUT=DIR;"
	@echo "                REHEARSE=1: the same program on a CPU, at most 3 minutes"
	@echo "make base       train the tiny base again, from nothing"
	@echo "make gain       does supervision help: trains and compares arms, goes on where it was left; MINUTES, ARMS, TEST=1"
	@echo "make scenes-base  train the base of make gain again; goes on where it was left"
	@echo "make lint       ruff and mypy           make docs       regenerate the settings table"
	@echo "make site       build the documentation with its API reference into site/"
	@echo "make venv       only install            make clean      remove caches and build output"
	@echo "LATEST=1 with any of these: the newest dependencies instead of the tested ones of constraints.txt"

venv: $(STAMP)

# The stamps are removed first and one is written last: a half-finished install is repeated, never trusted, and so is one of
# other versions. torch goes first and pinned, because the dependencies would otherwise choose a build of their own.
$(STAMP): setup.py constraints.txt
	@rm -f $(VENV)/.installed*
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check "$(TRITON)"
	$(BIN)/python -m pip install --disable-pip-version-check $(VERSIONS) "$(TORCH)" -e ".[test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny --overwrite
	@echo "Open in runs/tiny: samples.png (base above UNO-trained), curves.png (each loss over steps), summary.md"

inspect: $(STAMP)
	@test -f runs/tiny/checkpoints/latest || { echo "runs/tiny has no checkpoint: run 'make demo' first"; exit 2; }
	@test -f runs/tiny_flow/checkpoints/latest || $(MAKE) --no-print-directory tiny-flow
	$(BIN)/torchrun --nproc-per-node $(RANKS) scripts/inspect_model.py $(INSPECTED:%=--checkpoint %) --steps 25 --max-tokens 32 --batch 32
	@echo "Open runs/inspection/report.html"

# The demo without supervision.
.PHONY: tiny-flow
tiny-flow: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny --set name=tiny_flow \
		--set objective.caption_weight=0 --set objective.regression_weight=0 --overwrite

base: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe tiny_base

.PHONY: scenes-base gain
scenes-base: $(STAMP)
	$(BIN)/deepspeed --num_gpus $(RANKS) scripts/train.py --recipe scenes_base --resume auto

MINUTES ?= 150
gain: $(STAMP)
	$(BIN)/python -W ignore -m benchmarks gain scenes --minutes $(MINUTES) $(if $(ARMS),--arms $(ARMS)) $(if $(TEST),--test)

# Side by side, as far as they are there: the base, and the model of the demo.
MODELS := tiny_base $(wildcard runs/tiny/model)
eval: $(STAMP)
	for model in $(MODELS); do \
	    out=evaluations/$$(echo $$model | tr / _)/scenes; \
	    $(BIN)/python scripts/evaluate.py generate --benchmark scenes --checkpoint $$model --out $$out --batch 50 && \
	    $(BIN)/python scripts/evaluate.py score --benchmark scenes --images $$out || exit 1; \
	done
	$(BIN)/python scripts/evaluate.py report $(foreach model,$(MODELS),evaluations/$(subst /,_,$(model))/scenes)

# All tests in several processes, then those that state times, alone. Both always run.
test test-slow: $(STAMP)
	@failed=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not timed and not nodes$(UNLESS_SLOW)" || failed=1; \
	$(BIN)/python -m pytest -m "timed$(UNLESS_SLOW)" || failed=1; \
	exit $$failed
test: UNLESS_SLOW = $() and not slow

# Debian packages: iproute2 openssh-server pdsh, and slurm-wlm munge for Slurm. Without them or root it skips and says why.
test-nodes: $(STAMP)
	$(BIN)/python -m pytest tests/nodes -m nodes

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
	$(BIN)/python -m uno_ds.settings_page --write-docs

.PHONY: site
SITE_STAMP := $(VENV)/.installed-site

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
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
