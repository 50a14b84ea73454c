# make train        set up what is missing, then train the example on NP ranks (default 4)
# make test         set up, then run every test, distributed ones included
# make check        set up, then format, lint, types and fast tests (7 minutes on two cores)
# make bench        set up, then measure
# make setup        only set up: .venv, the pinned packages, Horovod, this project
# make horovod-gpu  set up with NCCL and the CUDA libraries, for NVIDIA GPUs
# make lock         pin what pyproject.toml asks for (UPGRADE=1: the newest of everything)
# make clean        remove .venv and what tools left; built Horovod wheels stay in the cache
#
# Settings: NP=4  ARGS="key=value ..." (for launch/train.py)  GPU=1  PYTHON=python3
#           PYTEST_ARGS="..." (for make test)

NP ?= 4
ARGS ?=
GPU ?=
PYTHON ?= python3
PYTEST_ARGS ?=
UPGRADE ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory
# TensorFlow's greetings, once a rank and process; its errors still show.
export TF_CPP_MIN_LOG_LEVEL ?= 3

KIND := $(if $(filter-out 0 no false,$(GPU)),gpu,cpu)
OTHER := $(if $(filter gpu,$(KIND)),cpu,gpu)
BIN := .venv/bin
STAMPS := .venv/stamps
LOGS := .venv/logs
LOCK := $(if $(filter gpu,$(KIND)),requirements-gpu.lock,requirements.lock)
EXTRAS := --extra mpi --extra dev --extra build --extra horovod-runtime --extra s3 --extra gcs
UV_COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

# $(call quietly,name,command): its output goes to a log, whose end is shown if it fails.
quietly = { $(2) ; } > $(LOGS)/$(1).log 2>&1 || { tail -n 30 $(LOGS)/$(1).log >&2; \
	echo "make: $(1) failed; the whole log: $(CURDIR)/$(LOGS)/$(1).log" >&2; exit 1; }

.PHONY: help train test check bench setup horovod-gpu lock clean

help:
	@sed -n 's/^# \?//p;/^$$/q' Makefile

train: setup
	@# horovodrun itself imports TensorFlow twice, whose notes no setting silences.
	@$(BIN)/horovodrun -np $(NP) $(BIN)/python launch/train.py $(ARGS) \
		2> >(grep --line-buffered -vE '^(WARNING: All log messages before absl|I0000 |To enable the following instructions)' >&2)

test: setup
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright
	@$(BIN)/python -m pytest -q -m "not distributed and not slow and not servers"

bench: setup
	@$(BIN)/python benchmarks/run.py $(ARGS)

horovod-gpu:
	@$(MAKE) setup GPU=1

setup: $(STAMPS)/horovod-$(KIND) $(STAMPS)/project

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$${CXX:-g++} --version > /dev/null 2>&1 || { \
		echo "make: building Horovod needs a C++ compiler, and $${CXX:-g++} was not found; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@# An environment that is already there stays as it is: venv would rewrite its settings.
	@if [ -x $(BIN)/python ]; then \
		echo "Using the .venv that is here, with $$($(BIN)/python --version)"; \
	else \
		echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; \
	fi
	@mkdir -p $(STAMPS) $(LOGS)
	@touch $@

$(STAMPS)/packages-$(KIND): $(LOCK) | $(STAMPS)/venv
	@echo "Installing the packages pinned in $(LOCK) ($(if $(filter gpu,$(KIND)),2-10 minutes: 3 GB of CUDA libraries,1-3 minutes))"
	@$(call quietly,packages,$(BIN)/python -m pip install --disable-pip-version-check --no-input --require-hashes -r $(LOCK))
	@touch $@

$(STAMPS)/horovod-$(KIND): $(STAMPS)/packages-$(KIND) tools/build_horovod
	@echo "Installing Horovod ($(KIND)); building it takes 2-6 minutes, once"
	@wheel=$$($(BIN)/python tools/build_horovod $(if $(filter gpu,$(KIND)),--gpu)); \
	$(call quietly,horovod,$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-index --no-deps --force-reinstall "$$wheel")
	@rm -f $(STAMPS)/horovod-$(OTHER)
	@touch $@

$(STAMPS)/project: pyproject.toml | $(STAMPS)/packages-$(KIND)
	@$(call quietly,project,$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-index --no-deps --no-build-isolation --editable .)
	@touch $@

lock:
	@echo "Pinning (about 20 seconds)"
	@tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	$(PYTHON) -m venv "$$tools" && "$$tools/bin/pip" install --quiet --disable-pip-version-check 'uv>=0.5'; \
	"$$tools/bin/uv" $(UV_COMPILE) $(EXTRAS) $(if $(UPGRADE),--upgrade) --output-file requirements.lock pyproject.toml; \
	"$$tools/bin/uv" $(UV_COMPILE) $(EXTRAS) --extra gpu --constraint requirements.lock $(if $(UPGRADE),--upgrade) \
		--output-file requirements-gpu.lock pyproject.toml
	@grep -c '^[a-z].*==' requirements.lock requirements-gpu.lock

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
