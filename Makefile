# The commands of every day; the steps are in deploy/scripts, so that CI, the Dockerfile and people
# run the same ones.
#   make build    programs into build/bin (installs what is missing)
#   make test     all tests, also under sanitizers; STAGES="asan tsan cpu" picks
#   make soak     the server in trouble, for minutes: overload, stalled readers, signals, kill -9; a table
#   make demo     asks a small model about a long document; MODEL=PATH uses your own
#   make models   fetches Qwen2.5-Coder 0.5B and 1.5B into models; MODELS="0.5b" one of them
#   make package  one archive in dist that runs on other machines; BACKEND=cpu leaves CUDA out
#   make format, make lint, make clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
JOBS ?= $(shell nproc)
MODEL ?=
MODELS ?=
# Lint compares with this commit; BASE=all checks every file.
BASE ?= HEAD
SCRIPTS := deploy/scripts
SOURCES := git ls-files '*.cc' '*.h' '*.cu' '*.cuh'

.PHONY: build test soak demo models package format lint clean
.DEFAULT_GOAL := build

build:
	$(SCRIPTS)/install_deps.sh build
	cmake --preset cpu
	cmake --build build --parallel $(JOBS) --target programs

test:
	$(SCRIPTS)/install_deps.sh build test demo
	JOBS=$(JOBS) $(SCRIPTS)/test.sh

soak:
	$(SCRIPTS)/install_deps.sh build test
	cmake --preset cpu
	cmake --build build --parallel $(JOBS) --target drills
	$(SCRIPTS)/soak.sh

demo: build
	MODEL="$(MODEL)" $(SCRIPTS)/demo.sh

models:
	MODELS="$(MODELS)" $(SCRIPTS)/fetch_models.sh

package:
	$(SCRIPTS)/install_deps.sh build package
	JOBS=$(JOBS) $(SCRIPTS)/package.sh

format:
	$(SCRIPTS)/install_deps.sh lint
	$(SOURCES) | xargs clang-format -i

lint:
	$(SCRIPTS)/install_deps.sh build lint
	cmake --preset cpu
	BASE="$(BASE)" JOBS=$(JOBS) $(SCRIPTS)/lint.sh

clean:
	rm -rf dist build build-asan build-tsan build-cuda
