# Every target makes what it needs: a clean clone, Python 3.11 or newer and a C++ compiler are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SANITIZED := build/sanitized
GPU := build/gpu
# Where the results of a CUDA device go, and what they say of the source.
GPU_RESULTS ?= bench/results
COMMIT ?= $(shell git describe --always --dirty 2>/dev/null)
CXX_SOURCES := $(wildcard csrc/*)

.PHONY: help venv demo test check format bench sanitize gpu gpu-lib gpu-test gpu-bench tune clean

help:
	@echo "make demo      meta-train a rule and compare it with tuned optimizers (minutes)"
	@echo "make test      run the test suite"
	@echo "make check     formatting, lint and types"
	@echo "make bench     run the benchmarks and write a report"
	@echo "make sanitize  run the C++ tests under AddressSanitizer and UBSan"
	@echo "make gpu       test and measure on a CUDA device (GPU_DRY_RUN=1: what of it runs without one)"
	@echo "make tune      time the launch configurations of the kernels on a CUDA device"
	@echo "make venv      only make $(VENV) and install the package into it"

venv: $(INSTALLED)

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(INSTALLED): $(VENV)/.requirements setup.py pyproject.toml $(CXX_SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: venv
	$(BIN)/l2l-fast demo

# By the file, for tests of one file share what is costly to make.
test: venv
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy bench
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: venv
	mkdir -p runs/bench
	$(BIN)/pytest bench --benchmark-only --benchmark-max-time=0.4 --benchmark-json=runs/bench/results.json
	$(BIN)/python bench/report.py runs/bench/results.json

# The whole package is built a second time, with instrumented C++, and put first on the path (which
# `python -m pytest` would not do: it puts the checkout there).
sanitize: export PYTHONPATH = $(abspath $(SANITIZED)/lib)
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: venv
	flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"; CFLAGS="$$flags" CXXFLAGS="$$flags" LDFLAGS="$$flags" \
	  $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	nm -D $(SANITIZED)/lib/l2l_fast/_C*.so | grep -q __asan_  # instrumented indeed
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"; \
	  cd tests && $(abspath $(BIN))/python -c "from l2l_fast import _C; assert '$(SANITIZED)' in _C.__file__, _C.__file__" && \
	  $(abspath $(BIN))/pytest -p no:cacheprovider test_backend_contract.py test_int8.py

# A CUDA machine brings its own PyTorch, so these take $(PYTHON) as it is: no network, no environment. Each part ends
# within ten minutes; `make gpu` runs the second whatever became of the first, whose outcome is part of the results.
ifdef GPU_DRY_RUN
GPU_TESTS := --gpu-dry-run tests/cuda tests/test_backend_contract.py -k "cuda or triton and packing"
GPU_BENCH := --dry-run --output $(GPU)/dry-run
TUNE := --dry-run
else
GPU_TESTS := tests/cuda tests/test_backend_contract.py tests/test_autograd.py $(wildcard tests/test_optim*.py) \
  tests/test_unroll.py -k "cuda or triton"
GPU_BENCH := --output $(GPU_RESULTS)
endif

gpu gpu-lib gpu-test gpu-bench tune: export PYTHONPATH = $(abspath $(GPU)/lib)

gpu:
	@$(MAKE) gpu-test; tests=$$?; $(MAKE) gpu-bench && exit $$tests

gpu-lib:
	mkdir -p $(GPU)/lib
	$(PYTHON) setup.py --quiet egg_info --egg-base $(GPU)/lib build --build-base $(GPU) --build-lib $(GPU)/lib
	$(PYTHON) -P -c "import l2l_fast.kernels; assert '$(GPU)' in l2l_fast.__file__, l2l_fast.__file__"

gpu-test: gpu-lib
	timeout --signal=INT 560 $(PYTHON) -P -m pytest -W default -p no:cacheprovider --durations=10 \
	  --junit-xml=$(GPU)/tests.xml $(GPU_TESTS)

gpu-bench: gpu-lib
	$(PYTHON) bench/gpu.py --sanitize --tests $(GPU)/tests.xml --commit "$(COMMIT)" $(GPU_BENCH)

tune: gpu-lib
	$(PYTHON) bench/tune.py $(TUNE)

clean:
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info l2l_fast/*.so
