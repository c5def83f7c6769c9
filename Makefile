# Two commands to know: `make demo` and `make test`. Each makes .venv itself and needs only python3 >= 3.10 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Two test processes of one thread each: two cores are used, and a process does not spin on the other's core. A file of quick tests stays in
# one process, as they share what was made for the file. Slow tests are handed out one by one: few of them are most of the time.
WORKERS ?= 2
FILES   := --numprocesses $(WORKERS) --dist loadfile
SINGLE  := --numprocesses $(WORKERS) --dist load --maxschedchunk 1
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

NUMERIC := tests/test_behavior.py tests/test_nan_policy.py tests/test_silent_values.py tests/test_operators.py tests/test_tokens.py tests/permutation \
  tests/engine tests/kernels/cpu tests/kernels/stacked tests/kernels/test_operations.py tests/codes/test_linear.py tests/codes/test_adaptive.py tests/faults/test_determinism.py

.PHONY: help demo test lint types quick slow thorough faults avx2 ci gpu kernels bench clean

help: ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

# torchvision without its dependencies: it would bring another torch; beside a CPU-only one its data set readers are all that works.
# One stamp an extra, so that `make demo` does not wait for linters and test tools. A stamp holds the sum of what is asked for
# (requirements, extras, commands, pins): pip runs when that has changed, and at no other change of pyproject.toml. The package is
# installed editable, so a changed source file needs no new stamp.
ASKED := $(shell sed -n '/^requires-python/p;/^dependencies = /,/^\]/p;/^\[project.optional-dependencies\]/,/^$$/p;/^\[project.scripts\]/,/^$$/p' \
  pyproject.toml | cat - constraints.txt | cksum | cut -d' ' -f1)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("wslfast needs Python 3.10 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

.PHONY: always
$(VENV)/.demo: always | $(BIN)/python
	@test "$$(cat $@ 2>/dev/null)" = "$(ASKED)" || { $(PIP) install --constraint constraints.txt --editable '.[eval,plot]' && echo $(ASKED) > $@; }

$(VENV)/.dev: always | $(BIN)/python
	@test "$$(cat $@ 2>/dev/null)" = "$(ASKED)" || { \
	$(PIP) install --constraint constraints.txt --editable '.[eval,plot,photos,triton,dev]' && \
	$(PIP) install --constraint constraints.txt --no-deps torchvision && echo $(ASKED) | tee $@ > $(VENV)/.demo; }

demo: $(VENV)/.demo ## a zoo, two autoencoders and the report, in a few minutes on a laptop's CPU: runs/demo/report.html
	$(BIN)/wslfast demo --out runs/demo $(DEMO_FLAGS)

test: lint types quick ## linter, type checker, quick tests (at most 12 minutes on 2 cores)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

# mypy knows no package-dir: the check runs on a tree of links that is laid out like the installed package.
types: $(VENV)/.dev
	@rm -rf build/types && mkdir -p build/types/wslfast
	@for f in wslfast/*; do ln -s "../../../$$f" build/types/wslfast/; done; ln -s ../../../kernels build/types/wslfast/kernels
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml -p wslfast

quick: $(VENV)/.dev
	$(PYTEST) $(FILES) -m "not slow and not gpu" $(PYTEST_FLAGS)

slow: $(VENV)/.dev
	$(PYTEST) $(SINGLE) -m "slow and not thorough and not gpu" $(PYTEST_FLAGS)

thorough: $(VENV)/.dev ## slow tests that make ci has no time for: every operation and layout, kernels for every target, races
	$(PYTEST) $(SINGLE) -m "thorough and not gpu" $(PYTEST_FLAGS)

faults: $(VENV)/.dev ## the fault matrix with its full figures, the guards, and docs/reliability.md's table (about half an hour)
	@rm -rf build/faults
	WSLFAST_FAULTS=full WSLFAST_FAULTS_OUT=build/faults $(BIN)/python -m pytest tests/faults -m "not gpu" $(PYTEST_FLAGS)
	$(BIN)/python tests/faults/guards.py --json build/faults/guards.json
	$(BIN)/python tests/faults/render.py build/faults docs/reliability.md

# The numbers once more as on a machine without AVX-512: no test may ask two matrix products for equal bits. With all threads, which the
# other tests do without: threads that wait without spinning do not cost the other process its core.
avx2: $(VENV)/.dev ## the numeric tests as on an AVX2 machine, on all threads (at most 6 minutes)
	OMP_WAIT_POLICY=PASSIVE ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
	$(BIN)/python -m pytest $(FILES) -m "not slow and not gpu" $(NUMERIC) $(PYTEST_FLAGS)

ci: test avx2 slow ## all that can be tested without a GPU (at most 45 minutes)

# Plain python3 from the tree: no virtual environment, no installation, no network.
gpu: ## on a machine with CUDA: kernels compiled, diagnosed, tested, timed, proved, in 9:30; rows go to $OUT or benchmarks/data
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_gate.py

kernels: $(VENV)/.dev ## without a GPU: every kernel compiled for every kind of GPU, every network raced, recorded (hours on two cores; goes on)
	$(BIN)/python -m benchmarks.kernels.record --races

api: $(VENV)/.dev ## docs/api.md from the docstrings
	$(BIN)/python docs/make_api.py

bench: $(VENV)/.dev ## the benchmark suite on this machine
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
