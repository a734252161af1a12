# `make demo` and `make test` need nothing but Python 3.10 or newer: the first call makes .venv and installs into it.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix bench bench-launcher bench-gpu test-gpu test-auto-gptq test-toolkits clean
SHELL := /bin/bash

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUTO_GPTQ := .venv-auto-gptq
BENCH_PEER := .venv-bench-peer
TOOLKITS := .venv-toolkits
# Toolkits for test-toolkits: make test-toolkits NAMES=hqq
NAMES ?= hqq llm_compressor auto_round
# Folders of models and texts for bench-launcher, by the names conf/ has for them
MODELS ?=
DATA ?=
# Pieces of bench-gpu, each under 10 minutes: python -m bench.gpu --help
PIECES ?=
# Arguments for pytest: make test TESTS="tests/quant -k gptq"
TESTS ?=
# Processes of test-gpu side by side, each with a context of its own on the device; empty: one, without pytest-xdist
WORKERS ?= 8

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# Containers often turn bytecode off; here every test process and Ray worker would compile the same modules again.
export PYTHONDONTWRITEBYTECODE :=

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" scripts/setup.sh "$(VENV)"
	@touch $@

setup: $(STAMP) ## make .venv and install (the other targets do this when needed)

demo: $(STAMP) ## a real sweep: the shipped model x rtn, gptq, awq x five formats on a local Ray cluster
	@$(BIN)/bitgrid run -m sweep=demo

check: $(STAMP) ## format, lint, types, layers, file lengths; prints nothing when all is well
	@scripts/check.sh "$(BIN)"

# One thread per test process, and one process more than cores, since tests wait for servers. The checks run beside them.
test: $(STAMP) ## make check, and every test
	@scripts/check.sh "$(BIN)" & check=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup $(TESTS); tests=$$?; \
	wait $$check && exit $$tests

# Triton's compiler, not its interpreter. Files with marked tests are looked for, since collecting the others takes longer than many tests do.
test-gpu: $(STAMP) ## the tests that need a CUDA device, the cheapest first, failures shown at once (WORKERS= for one process)
	@TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -m gpu -p tests.at_once --tb=short --timeout 180 \
	  $(if $(WORKERS),-n $(WORKERS)) $(if $(TESTS),$(TESTS),$$(grep -rl --include='test_*.py' 'mark\.gpu' tests))

fix: $(STAMP) ## format and repair what ruff can
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

bench: $(STAMP) $(BENCH_PEER)/.installed ## benchmarks; each prints our figure beside the other's
	@$(BIN)/python bench/compose.py
	@$(BIN)/python bench/kmeans.py
	@$(BIN)/python bench/gptq_block.py
	@$(BIN)/python bench/wq_gemv.py
	@$(BIN)/python bench/int8_linear.py
	@$(BIN)/python bench/demo.py
	@$(BIN)/python bench/launcher.py --demo --peer-python $(BENCH_PEER)/bin/python

bench-launcher: $(STAMP) $(BENCH_PEER)/.installed ## the real grid beside the other launcher: MODELS=folder DATA=folder (an hour or two)
	@test -n "$(MODELS)" -a -n "$(DATA)" || { echo "give the folders of models and texts: make bench-launcher MODELS=... DATA=..."; exit 2; }
	@$(BIN)/python bench/launcher.py --models "$(MODELS)" --data "$(DATA)" --peer-python $(BENCH_PEER)/bin/python

bench-gpu: $(STAMP) ## kernels and whole models on a GPU, beside peers and the device's limits (PIECES="hessian block" for some)
	@$(BIN)/python -m bench.gpu $(PIECES)

$(BENCH_PEER)/.installed: requirements/bench-peer.txt | $(STAMP)
	@echo "making $(BENCH_PEER), the environment of the other launcher"
	@$(BIN)/python -m venv --clear $(BENCH_PEER)
	@$(BENCH_PEER)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

test-auto-gptq: $(STAMP) ## load our exported checkpoints with the real auto-gptq, in an environment of its own (needs Python 3.11)
	@scripts/test_auto_gptq.sh "$(BIN)" "$(AUTO_GPTQ)"

test-toolkits: $(STAMP) ## our methods against hqq, llm-compressor and auto-round, each in an environment of its own (NAMES="hqq" for some)
	@scripts/test_toolkits.sh "$(BIN)" "$(TOOLKITS)" $(NAMES)

clean: ## remove the environments and every cache; stores and MLflow files stay
	@rm -rf $(VENV) $(AUTO_GPTQ) $(BENCH_PEER) $(TOOLKITS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
