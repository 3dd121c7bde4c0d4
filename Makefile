# Every target makes what it needs: a clean clone, Python 3.11 or newer and a C++ compiler are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SANITIZED := build/sanitized
CXX_SOURCES := $(wildcard csrc/*)

.PHONY: help venv demo test check format bench sanitize clean

help:
	@echo "make demo      meta-train a rule and compare it with tuned optimizers (minutes)"
	@echo "make test      run the test suite"
	@echo "make check     formatting, lint and types"
	@echo "make bench     run the benchmarks and write a report"
	@echo "make sanitize  run the C++ tests under AddressSanitizer and UBSan"
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

test: venv
	$(BIN)/pytest

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
	  $(abspath $(BIN))/pytest -p no:cacheprovider test_backend_contract.py

clean:
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info l2l_fast/*.so
