# Everything runs in .venv, which is made on first use and renewed when setup.py changes.
#   make train   install, then distil the emoji teacher      make test   lint, types and tests
#   make lint    ruff and pyright only                       make test-all  the slow tests as well
#   make demo    install the page's library, then start the page with the shipped student
# Variables: PYTHON, WORKDIR, EXTRAS (cuda or tpu: make train EXTRAS=cuda), PYTEST_FLAGS, WORKERS (none: one process).

PYTHON ?= python3
WORKDIR ?= runs/emoji
EXTRAS ?=
PYTEST_FLAGS ?= -m 'not slow'
# A process that is done takes tests over from another; at most 8 processes, for memory.
WORKERS ?= -n auto --maxprocesses=8 --dist worksteal

BIN := .venv/bin
STAMP := .venv/.stamp$(EXTRAS:%=-%)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)

.PHONY: train demo test pytest test-all lint .venv

.venv: $(STAMP)

$(STAMP): setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .$(EXTRAS:%=[%])
	touch $@

# torch comes first and alone: a CPU build of this version that pip has at hand then meets the pin, and nothing that
# is installed after it asks for a CUDA build.
.venv/.test-stamp: $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e .[test]
	touch $@

train: $(STAMP)
	$(BIN)/python launch/train.py --config=configs/emoji.py --workdir=$(WORKDIR)

.venv/.demo-stamp: $(STAMP)
	$(BIN)/python -m pip install --quiet -e .[demo]
	touch $@

demo: .venv/.demo-stamp
	$(BIN)/python launch/demo.py

lint: .venv/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Beside each other: a core is idle while pyright has one, and now and then while tests wait.
test: .venv/.test-stamp
	@$(MAKE) --no-print-directory -j2 lint pytest

pytest: .venv/.test-stamp
	$(BIN)/python -m pytest $(WORKERS) --durations=10 $(PYTEST_FLAGS)

test-all:
	@$(MAKE) --no-print-directory test PYTEST_FLAGS=
