# Thin on purpose: each recipe is a line or two that can be copied into a shell.
PY := .venv/bin/python

.PHONY: demo test test-elsewhere luck planted-bugs gpu-host-check fuzz browser-check slow-tests sanitize portable-check \
        lowest-check wheel-check bench cuda-build ptx-check kernel-report clean gpu-day

# From nothing to a student that tells better stories, in minutes on two cores (README.md). A demo that was stopped goes
# on; one that ended is replaced.
goes_on = $$(test ! -e runs/demo/$(1)/config.json || echo --resume)
demo: .venv/ready
	test ! -e runs/demo/interact/samples.jsonl || rm -rf runs/demo
	$(PY) train_pretrain.py --out runs/demo/pretrain $(call goes_on,pretrain)
	$(PY) train_interact.py --init runs/demo/pretrain --out runs/demo/interact $(call goes_on,interact)

# Style, types, native tests, Python tests. The first time, also the tests' packages.
test: .venv/tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs .venv/bin/clang-format --dry-run --Werror
	.venv/bin/cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	.venv/bin/cmake --build build/native -j 2
	.venv/bin/ctest --test-dir build/native --output-on-failure -j 2
	.venv/bin/pytest

# pytest as on other machines: first the kernels and torch as on a processor without AVX-512 and bfloat16, with one
# thread; then five threads beside four busy processes. Tests in random order; --randomly-seed=N repeats one. Then `luck`.
elsewhere = .venv/bin/pytest -v -p randomly
test-elsewhere: .venv/tests
	CXX='c++ -march=x86-64-v3' ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  OMP_NUM_THREADS=1 $(elsewhere)
	for i in 1 2 3 4; do yes > /dev/null & busy="$$busy $$!"; done; trap 'kill $$busy' EXIT; \
	  OMP_NUM_THREADS=5 $(elsewhere)
	$(MAKE) luck

# The tests in which a student writes, once per value of luck: other weights, last bits, seeds or dtypes
# (tests/luck/luck.py). About three minutes each on two cores; make luck LUCKS=7 repeats one value.
LUCKS := 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20
luck: .venv/tests
	for luck in $(LUCKS); do \
	  LUCK=$$luck PYTHONPATH=tests/luck .venv/bin/pytest -p luck --students --ignore tests/data --ignore tests/ops || \
	    { echo "make luck LUCKS=$$luck repeats this failure"; exit 1; }; done

# What takes longer; the hosted workflow runs it. One bug at a time in the CUDA kernels, which their tests must catch:
planted-bugs: .venv/tests
	$(PY) tests/planted_bugs.py simt

# A GPU's host path (copies, streams, graphs, waits) on a simulated device, and bugs planted in it. No GPU.
gpu-host-check: .venv/tests
	.venv/bin/pytest -m '' tests/cuda_device
	$(PY) tests/planted_bugs.py host

# Property tests, with fifty times as many examples as in `make test`.
fuzz: .venv/tests
	TINYSTORY_FUZZ=50 .venv/bin/pytest -m hypothesis

# The page on which a person grades, in a real browser. Debian: apt install chromium
browser-check: .venv/tests
	.venv/bin/pytest -m slow tests/human/test_browser.py

slow-tests: .venv/tests
	.venv/bin/pytest -m slow --ignore tests/human/test_browser.py --ignore tests/cuda_device

# The native tests of the CPU kernels under AddressSanitizer and UBSan, then under ThreadSanitizer.
sanitize: .venv/tests
	for kind in address thread; do \
	  .venv/bin/cmake -S . -B build/$$kind -DSANITIZE=$$kind && .venv/bin/cmake --build build/$$kind -j 2 && \
	  .venv/bin/ctest --test-dir build/$$kind --output-on-failure || exit 1; done

# The native tests of the CPU kernels, compiled by clang++ for two older x86-64 processors, and for ARM without and with
# its bf16 instructions, which QEMU emulates. Then the operators in torch, compiled by clang++, which gives them threads
# of our own instead of OpenMP.
# Debian, Ubuntu: apt install clang g++-aarch64-linux-gnu qemu-user
native = .venv/bin/cmake -S . -B build/$(1) -DSIMT=OFF $(2) && .venv/bin/cmake --build build/$(1) -j 2 && \
         .venv/bin/ctest --test-dir build/$(1) --output-on-failure
aarch64 = -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
          -DCMAKE_EXE_LINKER_FLAGS=-static
portable-check: .venv/tests
	$(call native,x86-64-v3,-DCMAKE_CXX_COMPILER=clang++ -DARCH=-march=x86-64-v3)
	$(call native,x86-64,-DCMAKE_CXX_COMPILER=clang++ -DARCH=-march=x86-64)
	$(call native,aarch64,$(aarch64) -DARCH= -DCMAKE_CROSSCOMPILING_EMULATOR='qemu-aarch64;-cpu;cortex-a72')
	$(call native,aarch64-bf16,$(aarch64) -DARCH=-march=armv8.6-a -DTWINS=OFF -DCMAKE_CROSSCOMPILING_EMULATOR='qemu-aarch64;-cpu;max')
	CXX=clang++ TINYSTORY_CACHE=build/clang .venv/bin/pytest tests/ops

# The tests at the oldest versions that pyproject.toml allows; PYTHON=python3.10 for the oldest Python. 6 GB.
PYTHON := python3
lowest-check:
	python3 -m venv build/uv && build/uv/bin/pip install --quiet uv
	build/uv/bin/uv venv --clear --python $(PYTHON) build/lowest
	build/uv/bin/uv pip install --python build/lowest --resolution lowest-direct --editable '.[test]'
	TINYSTORY_CACHE=build/lowest/cache build/lowest/bin/pytest

# A wheel, installed without the clone and run with an empty HOME in an empty folder. Its dependencies are .venv's.
wheel-check: .venv/ready
	rm -rf build/lib build/bdist.*
	set -e; new=$$(mktemp -d); trap 'rm -rf $$new' EXIT; mkdir $$new/home $$new/empty; \
	.venv/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $$new .; \
	$(PY) -m venv --without-pip $$new/venv; \
	.venv/bin/pip --python $$new/venv/bin/python install --quiet --no-deps $$new/*.whl; \
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $$new/venv/lib/python*/site-packages)/from-clone.pth; \
	cd $$new/empty; export PATH=$$new/venv/bin:$$PATH HOME=$$new/home; unset PYTHONPATH TINYSTORY_CACHE XDG_CACHE_HOME; \
	tinystory-pretrain --out pretrain --words 20000; \
	tinystory-interact --init pretrain --out interact --steps 2 --stories-per-step 8; \
	tinystory-sample interact; tinystory-doctor

# Our speed on this machine, a JSON line each; --shape gpt2s for GPT-2-small.
bench: .venv/ready
	for part in kernels pretrain rollout ppo; do $(PY) lab/bench.py $$part --shape small; done

# The CUDA kernels, bound to PyPI's torch for CUDA 13: compiled, loaded and disassembled; a skipped test fails. Needs nvcc
# 13, no GPU; 6 GB.
cuda-build:
	python3 -m venv build/cuda
	build/cuda/bin/pip install --quiet torch==2.11.0 --editable '.[test,cuda-tools]'
	TINYSTORY_CACHE=build/cuda/cache build/cuda/bin/pytest -m '' --no-skips tests/ops/test_cuda_binding.py tests/ops/test_cuda_compile.py

# Every CUDA kernel as nvcc compiles it, its PTX interpreted; then bugs planted in the inline PTX. Skipped without nvcc.
ptx-check: .venv/tests
	.venv/bin/cmake -S tests/native/ptx -B build/ptx && .venv/bin/cmake --build build/ptx -j 2
	.venv/bin/ctest --test-dir build/ptx --output-on-failure && \
	{ $(PY) tests/planted_bugs.py ptx || [ $$? = 77 ]; }

# What the CUDA kernels do to memory, per source line, and their machine code, beside their budgets; the latter needs nvcc
# and pip install '.[cuda-tools]'. What attention loses because its blocks do not end together.
kernel-report: .venv/tests
	.venv/bin/cmake -S tests/native/simt -B build/simt && .venv/bin/cmake --build build/simt -j 2 --target simt_trace
	build/simt/simt_trace report && { $(PY) tests/native/simt/sass_report.py || [ $$? = 77 ]; }
	$(PY) tests/native/simt/grid_report.py

# On a machine with a GPU: doctor, build, a launch of each kernel, speeds, tests, sanitizers, in this order, and each
# result at once in build/gpu-day.json. Without .venv, the python3 that has PyTorch for CUDA runs it (scripts/gpu_day.py).
gpu-day:
	$$(test -x $(PY) && echo $(PY) || echo python3) scripts/gpu_day.py

clean:
	rm -rf .venv build runs/demo

.venv/ready: pyproject.toml
	@python3 -c 'import ensurepip, venv' || { echo "python3 has no venv: install it (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@command -v c++ >/dev/null || { echo "no C++ compiler: install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"; exit 2; }
	@echo "installing into .venv, 1 GB; on Linux PyPI's torch adds 4 GB of CUDA libraries, which the CPU's wheel leaves out:"
	@echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"
	python3 -m venv .venv
	.venv/bin/pip install --quiet --editable .
	@touch $@

.venv/tests: .venv/ready
	@echo "installing the packages of the tests into .venv, 0.8 GB"
	.venv/bin/pip install --quiet --editable '.[test]'
	@touch $@
