# make demo | test | test-matrix | test-slurm | test-vllm | test-te | test-browser | soak | breakages | parity | bench | bench-all |
# lint: each sets up its own environment in .venv first.
PYTHON ?= python3
# torch goes first: with it there, nothing below asks for another build of it.  On a machine with
# GPUs the plain package brings CUDA; on one without, any CPU build of this version will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-matrix test-slurm test-vllm test-te test-browser soak breakages parity bench bench-all lint format setup clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/pretrain_phf.sh

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/slurm \
		--ignore tests/real_te --ignore tests/real_vllm \
		$(if $(shell command -v chromium),,--ignore tests/browser)

# Every combination of three layout settings, up to 16 processes: give it an hour on 2 CPU cores.
test-matrix: $(READY)
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel/test_matrix.py -s --matrix-strength 3 \
		--matrix-processes 16 --matrix-report runs/matrix.json

# Jobs on a real two-node SLURM cluster on this machine; needs root, installs Debian's packages.
test-slurm: $(READY)
	bash tests/slurm/with_slurm.sh $(BIN)/python -m pytest tests/slurm

# The report in headless Chromium; installs Debian's package where root may.
test-browser: $(READY)
	bash tests/browser/with_chromium.sh $(BIN)/python -m pytest tests/browser

# Jobs over vLLM itself on the CPU, in an environment of its own (3.4 GB): about ten minutes.
test-vllm: $(READY)
	PYTHON=$(PYTHON) bash tests/real_vllm/setup.sh .venv-vllm "$(TORCH)"
	$(BIN)/python -m pytest tests/real_vllm -rP

# Transformer Engine's own Python with its extension stubbed, beside the tests' stand-in for it.
test-te: $(READY)
	PYTHON=$(BIN)/python bash tests/real_te/setup.sh .venv-te
	$(BIN)/python -m pytest tests/real_te

# Break the product on purpose; the tests must notice.
breakages: $(READY)
	$(BIN)/python -m tests.breakages

# The product beside plain transformers on a tiny model at TP = 2 x PP = 2.
parity: $(READY)
	$(BIN)/python tools/parity.py --make-tiny-model --tensor-model-parallel-size 2 \
		--pipeline-model-parallel-size 2

# 110 kills at random times, and 40 with rollouts under way: about 15 minutes on 2 CPU cores.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --served --kills 40 --steps 100

# One figure of each kind of docs/performance.md on this machine: about 10 minutes on 2 CPU cores.
bench: $(READY)
	$(BIN)/python -m benchmarks

# All of them, with more rounds: about 40 minutes.
bench-all: $(READY)
	$(BIN)/python -m benchmarks --all

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

setup: $(READY)

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
