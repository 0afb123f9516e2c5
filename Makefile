# Each target makes its own virtual environment if there is none and installs what it needs:
# on a machine with Python >= 3.10 and g++, `make demo` and `make test` are all there is to do.
#
#   TORCH=torch==2.11.0   the torch to install (default: the release diffnl is tested with)
#   PYTHON=python3.12     the Python the environment is made with
#   ARGS="--epochs 5"     passed on to the script that demo or bench runs, or to pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
ASAN := build/asan

.PHONY: demo elastic test asan lint format bench wheel clean

demo: $(VENV)/examples.installed
	$(BIN)/python examples/train_mlip.py $(ARGS)

elastic: $(VENV)/examples.installed
	$(BIN)/python examples/elastic_constants.py $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(ARGS)

# The list and gradient tests again, on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Leak checking is off: the Python interpreter does not free everything at its end.
asan: $(VENV)/test.installed
	DIFFNL_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(ASAN) --build-temp $(ASAN)/objects
	cp diffnl/*.py $(ASAN)/diffnl/
	$(ASAN_RUN) $(BIN)/python -P -c "import diffnl; assert '$(ASAN)' in diffnl.__file__, diffnl.__file__"
	$(ASAN_RUN) $(BIN)/pytest -p no:cacheprovider tests/test_list.py tests/test_hypothesis.py \
	    tests/test_derivatives.py $(ARGS)

ASAN_RUN = PYTHONPATH=$(ASAN) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"

lint: $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/bench.installed
	$(BIN)/python benchmarks/neighbors.py $(ARGS)

wheel: $(VENV)/torch.installed
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist *.egg-info diffnl/_C*.so

# ------------------------------------------------------------------------------- environments

$(VENV)/torch.installed:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" wheel ninja
	touch $@

$(VENV)/lint.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$($(PYTHON) -c "import re; print(*re.findall(r'\"((?:ruff|clang-format)==[^\"]+)\"', open('pyproject.toml').read()))")
	touch $@

# examples, test, bench: the extras of pyproject.toml, and diffnl built from this checkout.
$(VENV)/%.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@
