# Every command does its own set-up. `make test` and `make demo` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

EMULATOR ?= ../shared
EMULATE := PYTHONPATH=.:$(EMULATOR) $(RUN) -m pytest -q -p tests.emulated
TRITON ?=

.PHONY: setup demo test lint gate emulate bench readme-tables clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-others.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastgen needs Python 3.10 or newer; found " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 test")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-others.txt
	touch $@

demo: setup
	$(RUN) -m fastgen demo

test: setup
	$(RUN) -m pytest -n 2 --dist worksteal

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Another Triton than the pinned one: make gate TRITON=folder, where `pip install --target folder triton==...` put it.
gate: setup
	PYTHONPATH=$(TRITON) $(RUN) -m fastgen.kernels.catalogue

# A quick part of the tests with compiled kernels in ptxemu, which lies in the folder EMULATOR.
emulate: setup
	PTXEMU_ARCH=90 $(EMULATE) tests/ops/test_masked_conv2d_tiles.py -k "bfloat16 and 128-256 or tf32 and 64-64"
	PTXEMU_ARCH=80 $(EMULATE) tests/ops/test_masked_conv2d_triton.py tests/ops/test_reparameterize_kl.py \
		tests/kernels/test_lstm_kernels.py tests/ops/test_reconstruction_nll.py \
		-k "groups_of_colours or second_map or free_bits or layout_changes or row_operation or sixty_digits"
	PTXEMU_ARCH=90 $(EMULATE) tests/kernels/test_counts.py tests/ops/test_masked_conv2d_counts.py
	PTXEMU_ARCH=80 $(EMULATE) tests/ops/test_masked_conv2d_counts.py
	PTXEMU_ARCH=80 $(EMULATE) tests/sampling/test_gpu_emulated.py -k one_launch

bench: setup
	$(RUN) -m benchmarks

readme-tables: setup
	$(RUN) -m benchmarks readme-tables

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
