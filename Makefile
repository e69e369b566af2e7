# Thin on purpose: each recipe is a line or two that can be copied into a shell.
PY := .venv/bin/python

.PHONY: demo test sanitize bench cuda-build kernel-report gpu-check clean

# From nothing to a student that tells better stories: about ten minutes on two cores.
demo: .venv/ready
	rm -rf runs/demo
	$(PY) train_pretrain.py --out runs/demo/pretrain
	$(PY) train_interact.py --init runs/demo/pretrain --out runs/demo/interact

# Style, types, native tests, Python tests.
test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs .venv/bin/clang-format --dry-run --Werror
	.venv/bin/cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	.venv/bin/cmake --build build/native -j 2
	.venv/bin/ctest --test-dir build/native --output-on-failure
	.venv/bin/pytest

# The native tests of the CPU kernels under AddressSanitizer and UBSan, then under ThreadSanitizer.
sanitize: .venv/ready
	for kind in address thread; do \
	  .venv/bin/cmake -S . -B build/$$kind -DSANITIZE=$$kind && .venv/bin/cmake --build build/$$kind -j 2 && \
	  .venv/bin/ctest --test-dir build/$$kind --output-on-failure || exit 1; done

# Our speed on this machine, a JSON line each; --shape gpt2s for GPT-2-small.
bench: .venv/ready
	for part in kernels pretrain rollout ppo; do $(PY) scripts/bench.py $$part --shape small --json; done

# The CUDA kernels, bound to PyPI's torch for CUDA 13: compiled, loaded and disassembled. Needs nvcc 13, no card; 6 GB.
cuda-build:
	python3 -m venv build/cuda
	build/cuda/bin/pip install --quiet torch==2.11.0 --editable '.[test]'
	TINYSTORY_CACHE=build/cuda/cache build/cuda/bin/pytest tests/ops/test_cuda_binding.py tests/ops/test_cuda_compile.py

# What the CUDA kernels do to memory, per source line, and their machine code if nvcc is there, beside their budgets.
kernel-report: .venv/ready
	.venv/bin/cmake -S tests/native/simt -B build/simt && .venv/bin/cmake --build build/simt -j 2 --target simt_trace
	build/simt/simt_trace report && { $(PY) tests/native/simt/sass_report.py || [ $$? = 77 ]; }

# On a machine with a card: the GPU tests, the kernels' tests again under compute-sanitizer, and our speed beside the card's.
gpu-check: .venv/ready
	.venv/bin/pytest -m gpu
	TINYSTORY_TEST_SHAPES=12 compute-sanitizer --error-exitcode 1 .venv/bin/pytest -m gpu -k "not device_sees and not interaction"
	TINYSTORY_TEST_SHAPES=12 compute-sanitizer --tool racecheck --error-exitcode 1 .venv/bin/pytest -m gpu -k "same_bits"
	for shape in small gpt2s; do $(PY) scripts/bench.py kernels --device cuda --shape $$shape --batch 32 --runs 50; done

clean:
	rm -rf .venv build runs/demo

.venv/ready: pyproject.toml
	@python3 -c 'import ensurepip, venv' || { echo "python3 has no venv: install it (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@command -v c++ >/dev/null || { echo "no C++ compiler: install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"; exit 2; }
	python3 -m venv .venv
	.venv/bin/pip install --quiet --editable '.[test]'
	@touch $@
