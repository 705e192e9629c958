# Two commands do everything on a fresh Debian or Ubuntu machine with git and Rust: `make quickstart` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

RANKS ?= 4
RUN_DIR ?= runs/quickstart
STEPS ?= 200
MPIRUN := mpirun --oversubscribe $(if $(filter 0,$(shell id -u)),--allow-run-as-root)

.PHONY: help
help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install the system packages that building and running need.
	@deploy/setup.sh

.PHONY: build
build: setup ## Build moe-worker and moe-launch, optimised.
	cargo build --release --locked

# NVIDIA's compiler alone, without a driver or root: 270 MB. An own one serves as well: CUDA_HOME or NVCC names it.
CUDA_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
CUDA_VENV := .local/cuda-venv

# A link to the folder that CUDA calls its home; left out where there is a compiler already.
.local/cuda/bin/nvcc:
	@if [ -n "$${CUDA_HOME:-}$${NVCC:-}" ] || command -v nvcc >/dev/null; then exit 0; fi; \
	mkdir -p .local && python3 -m venv $(CUDA_VENV) && $(CUDA_VENV)/bin/pip install --quiet $(CUDA_PACKAGES) && \
	ln -sfn "$$(cd $(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu13 && pwd)" .local/cuda

.PHONY: cuda
cuda: setup .local/cuda/bin/nvcc ## Build moe-worker and moe-launch for GPUs, optimised; fetches NVIDIA's compiler where there is none.
	MOE_COMMIT=$$(git rev-parse --short HEAD 2>/dev/null || echo unknown) cargo build --release --locked --features moe-runtime/cuda,moe-launcher/cuda

.PHONY: test-cuda
test-cuda: ## Compile every kernel for every architecture, and lint what is for GPUs; needs no GPU.
	@# Linting runs the build script that compiles the kernels.
	@if $(MAKE) --no-print-directory .local/cuda/bin/nvcc; then \
		cargo clippy --workspace --all-targets --features moe-kernels/cuda,moe-runtime/cuda,moe-launcher/cuda --locked -- -D warnings; \
	else echo "skipped: kernels are not compiled, since there is no nvcc here and PyPI cannot be reached"; fi

.PHONY: quickstart
quickstart: build ## Train a small MoE model on real text with four MPI ranks, then let it write.
	@rm -rf $(RUN_DIR)
	$(MPIRUN) -n $(RANKS) target/release/moe-worker --run-dir $(RUN_DIR) --steps $(STEPS) --set train.log_every=20
	@echo; echo "A sample from the trained model:"
	target/release/moe-launch generate --checkpoint $(RUN_DIR) --prompt "pub fn " --tokens 200

.PHONY: test
test: setup ## Everything CI runs: format, lints, documentation, all tests, runs under mpirun.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --package moe-runtime --no-default-features --lib --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	cargo test --workspace --locked
	$(MAKE) --no-print-directory test-cuda
	$(MAKE) --no-print-directory test-deploy

.PHONY: test-deploy
test-deploy: ## Job files: Slurm on a cluster of one machine, Kubernetes' validated and their commands run, the Dockerfile linted.
	@# The programs as the tests build them, so that after them nothing is built again.
	cargo test --workspace --locked --no-run
	@deploy/setup-tests.sh
	@python=.local/deploy-venv/bin/python; [ -x "$$python" ] || python=python3; \
	PYTHONDONTWRITEBYTECODE=1 "$$python" -m unittest discover -v -s deploy/tests

VENV := .local/venv
EXPORTED := target/transformers

# PyTorch for CPUs alone: the other builds are ten times as large. The stamp comes last, so that what failed is tried again.
$(VENV)/ready:
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu || $(VENV)/bin/pip install --quiet torch
	$(VENV)/bin/pip install --quiet "transformers>=5" safetensors numpy
	touch $@

.PHONY: test-transformers
test-transformers: $(VENV)/ready ## Open exported models with Hugging Face transformers and compare logits.
	rm -rf $(EXPORTED)
	mkdir -p $(EXPORTED)
	MOE_EXPORT_DIR=$(CURDIR)/$(EXPORTED) cargo test --package moe-runtime --test conversions --locked -- --ignored folders_for_transformers
	$(VENV)/bin/python runtime/tests/python/transformers_parity.py $(EXPORTED)

.PHONY: clean
clean: ## Remove what was built.
	cargo clean
