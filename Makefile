# `make demo` and `make test` set up a virtual environment in .venv on their own; nothing else is needed
# but Python 3.11 or newer. PYTHON chooses the interpreter. Versions are those of constraints.txt; of PyTorch,
# say, another one is `make test CONSTRAINTS= TORCH=torch==2.12.0`. TESTED=1 enters in docs/versions.md with
# which versions `test`, `test-newest` or `test-lowest` passed.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
# Without an NVIDIA driver, PyTorch's CPU build is a tenth of the size of the one PyPI would give.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu)
BIN := $(VENV)/bin
CONSTRAINED := $(addprefix --constraint ,$(CONSTRAINTS))
NEWEST := .venv-newest
LOWEST := .venv-lowest
WORKERS ?= 2
# Of a test with many parameters (families, methods, shapes), so many are in the quick set.
FEW ?= 2
# Runs tests with the Python of a folder, under the name that docs/versions.md has for what is installed there.
pytest = $(1)/python $(if $(TESTED),tests/versions_table.py $(2),-m pytest) -n $(WORKERS) --dist $(DIST)
# The order is that of tests/conftest.py, which begins with what takes longest.
DIST ?= loadfile --no-loadscope-reorder

# Tests start many processes; each would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-quick test-newest test-lowest mutations lint fix docs families bench sanitize aarch64 specimen clean always

help:
	@echo "make demo        set up, then fit the specimen to half its memory (a few minutes)"
	@echo "make test        set up, then lint, type-check and run every test"
	@echo "make test-quick  of every test that is not slow, a few of its parameters: for between two changes"
	@echo "make test-newest every test that is not slow with the newest versions allowed, in $(NEWEST)"
	@echo "make test-lowest the same with the lowest versions that pyproject.toml allows, in $(LOWEST)"
	@echo "make mutations   put faults into a copy of the code, one by one: tests must find each (minutes)"
	@echo "make lint fix    check the style; mend what can be mended"
	@echo "make docs        write the generated pages again"
	@echo "make families    run every check on every transformers family and write its table"
	@echo "make bench       time the kernels against transformers' own (be alone on the machine)"
	@echo "make sanitize    run the compiled kernels under AddressSanitizer and UBSan"
	@echo "make aarch64     run the portable kernels as 64-bit ARM in an emulator"
	@echo "make specimen    train the model that comes with mixtura, with mixtura train (hours; resumable)"

$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH_INDEX) $(CONSTRAINED) "$(TORCH)"
	touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINED) --editable ".[test]"
	touch $@

# Whatever was released since is taken at every call.
$(NEWEST)/.ready: pyproject.toml always
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --retries 1 --upgrade $(TORCH_INDEX) torch
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]"
	touch $@

$(LOWEST)/.ready: pyproject.toml tests/lowest_versions.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --retries 1 $(TORCH_INDEX) -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/mixtura fit --out demo-fit

test: lint
	$(call pytest,$(BIN),constraints)

test-quick: $(VENV)/.ready
	$(call pytest,$(BIN),quick) -m "not slow" --few $(FEW)

test-newest: $(NEWEST)/.ready
	$(call pytest,$(NEWEST)/bin,newest) -m "not slow"

test-lowest: $(LOWEST)/.ready
	$(call pytest,$(LOWEST)/bin,lowest) -m "not slow"

mutations: $(VENV)/.ready
	$(BIN)/python tests/mutations.py

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

fix: $(VENV)/.ready
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

docs: $(VENV)/.ready
	$(BIN)/python -m mixtura.authoring.docs

families: $(VENV)/.ready
	$(BIN)/python tests/families_table.py

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/routers.py

sanitize: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet $(CONSTRAINED) nanobind
	cmake -S . -B build/sanitize -DMIXTURA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 PYTHONPATH=tests/kernels \
	MIXTURA_SANITIZED=$$(echo build/sanitize/_native*.so) \
	$(BIN)/python -m pytest -q -p sanitized \
	  tests/kernels/test_native_products.py tests/kernels/test_native_experts.py tests/kernels/test_native_nested.py \
	  tests/kernels/test_native_trellis.py tests/kernels/test_step_layers.py tests/kernels/test_step_stack.py

# Debian: apt install g++-aarch64-linux-gnu qemu-user. On such a machine itself: make aarch64 AARCH64= EMULATOR=
AARCH64 ?= aarch64-linux-gnu-
EMULATOR ?= qemu-aarch64
NATIVE := src/mixtura/kernels/native

aarch64:
	mkdir -p build/aarch64
	$(AARCH64)g++ -std=c++20 -O2 -static -pthread -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -I $(NATIVE) \
	  -o build/aarch64/check tests/kernels/portable_check.cpp \
	  $(filter-out %module.cpp %watch.cpp $(NATIVE)/isa_avx%,$(wildcard $(NATIVE)/*.cpp))
	$(EMULATOR) build/aarch64/check

specimen: $(VENV)/.ready
	$(BIN)/python -m mixtura.train.specimen.make

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf src/mixtura/kernels/*.so *.a CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja cmake_install.cmake
	rm -rf .cmake .ninja_deps .ninja_log .skbuild-info.json
