"""With an unsuitable GPU or CUDA toolkit, the CPU runs, and --device cuda ends in one sentence."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from tests.conftest import ROOT, using
from tinystory import ops
from tinystory.ops import backend, build, compute, cuda
from tinystory.ops.compute import pick_dtype
from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A torch with CUDA 13.0, a whole toolkit of 13.1, and one GPU of compute capability 9.0.
    Returns a setter."""
    assert ops.load(), "the CPU's kernels, before the build is replaced"
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    built = []

    def has(*, gpus=((9, 0),), nvcc="13.1", header=True, fails="", torch_cuda="13.0"):
        cuda.load.cache_clear()
        (home / "bin/nvcc").write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n"
        )
        (home / "bin/nvcc").chmod(0o755)
        if not header:
            (home / "include/cuda_runtime.h").unlink()
        if not nvcc:
            (home / "bin/nvcc").unlink()
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda d=0: gpus[getattr(d, "index", d) or 0]
        )
        monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # no GPU is here
        # as containers have it, and not heeded
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
        built.clear()

        def compile_for(name, sources, folder, gpus, defines):
            built.append(gpus)
            if fails:
                raise fails if isinstance(fails, Exception) else RuntimeError(fails)
            (folder / f"{name}.so").touch()

        monkeypatch.setattr(build, "compiled", compile_for)
        return built

    yield has
    cuda.load.cache_clear()


def test_the_gpus_here_are_compiled_for(machine):
    built = machine(gpus=((9, 0), (8, 6), (9, 0)))
    assert compute.pick_device("auto").type == "cuda" and built == ["8.6;9.0"]
    machine(gpus=())
    assert cuda.architectures() == ["8.0", "9.0"]  # no GPU: what `make cuda-build` compiles for


NO_TOOLKIT = "no nvcc and headers of 13: install .* version 13 and set CUDA_HOME.*--device cpu"
BAD = {
    "no nvcc": (dict(nvcc=""), NO_TOOLKIT),
    "an nvcc without headers": (dict(header=False), NO_TOOLKIT),
    "another major version": (dict(nvcc="12.8"), NO_TOOLKIT),
    "a silent nvcc": (dict(nvcc="unknown"), NO_TOOLKIT),
    "nvcc too old for gcc": (
        dict(fails="Error building extension\n#error -- unsupported GNU version!"),
        "nvcc refuses this C.. compiler: .*CC=gcc-13",
    ),
    "nvcc too old for glibc": (
        dict(fails="math.h(206): error: exception specification is incompatible with that of"),
        "does not know the C library .*glibc 2.42.*: install a newer CUDA toolkit",
    ),
    "nvcc too old for the GPU": (
        dict(fails="nvcc fatal   : Unsupported gpu architecture 'compute_121'"),
        "nvcc does not know this GPU: install a newer CUDA toolkit",
    ),
    "torch too old for the GPU": (
        dict(fails=ValueError("Unknown CUDA arch (12.1) or GPU not supported")),
        "this PyTorch does not know this GPU: install a newer PyTorch",
    ),
    "another error": (
        dict(fails="Error building extension 'x'\n[1/9] nvcc a.cu\na.cu(3): error: no such name"),
        r"a.cu\(3\): error: no such name",
    ),
    "an old GPU": (
        dict(gpus=((7, 5),)),
        "GPU has compute capability 7.5, .* 8.0 or more .*bfloat16.*TINYSTORY_KERNELS=reference",
    ),
    "an old GPU before a new one": (
        dict(gpus=((7, 5), (8, 0))),
        "GPU has compute capability 7.5, .* 8.0 or more",
    ),
    "a GPU that is not NVIDIA's": (dict(torch_cuda=None), "PyTorch is built without CUDA"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_cpu_runs_and_device_cuda_is_one_sentence(machine, capsys, case):
    settings, sentence = BAD[case]
    machine(**settings)
    assert compute.pick_device("cpu").type == "cpu"
    assert backend.implementation("sample", torch.zeros(1)) == "kernel"
    assert capsys.readouterr() == ("", "")
    assert compute.pick_device("auto").type == "cpu"
    printed = capsys.readouterr().err.splitlines()
    chosen = [line for line in printed if "--device auto uses the CPU" in line]
    assert len(chosen) == 1 and re.search(
        sentence.split("TINYSTORY")[0].split(".*--dev")[0], chosen[0]
    )
    with pytest.raises(UserError, match=sentence):
        compute.pick_device("cuda")


def test_a_build_that_failed_is_not_tried_again_until_something_changes(machine, capsys):
    built = machine(fails="a.cu(3): error: no such name")
    for _ in range(2):
        cuda.load.cache_clear()
        with pytest.raises(UserError, match=r"no such name(.|\n)*to try again, delete .*kernels"):
            cuda.load()
    assert len(built) == 1
    machine(fails="nvcc error: No space left on device", nvcc="13.2")
    for _ in range(2):  # which may be different the next time
        cuda.load.cache_clear()
        with pytest.raises(UserError, match="No space left"):
            cuda.load()
    assert len(built) == 2
    machine(nvcc="13.3")
    cuda.load()


def test_a_gpu_that_is_not_the_first_is_judged_by_its_own_capability(machine):
    machine(gpus=((8, 0), (7, 5)))
    assert compute.pick_device("cuda:0").type == "cuda"
    with pytest.raises(UserError, match=r"this GPU has compute capability 7\.5"):
        compute.pick_device("cuda:1")
    machine(gpus=((7, 5), (8, 0)))
    assert pick_dtype("auto", torch.device("cuda:0")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda:1")) == torch.bfloat16


def test_tf32_is_an_option_on_a_gpu(machine, monkeypatch):
    precision = torch.backends.cuda.matmul.fp32_precision
    machine()
    try:
        chosen = compute.resolve("cuda", "tf32")
        assert (chosen.dtype, chosen.recorded["dtype"]) == (torch.float32, "tf32")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        compute.resolve("cuda", "float32")
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    with pytest.raises(UserError, match=r"--dtype tf32 needs an NVIDIA GPU .* is on cpu"):
        compute.resolve("cpu", "tf32")


def test_attention_is_compiled_for_the_dtype_and_head_size_that_an_operator_needs(
    machine, monkeypatch
):
    libraries, added = [], []
    monkeypatch.setattr(
        cuda,
        "built",
        lambda name, sources, defines=(): (libraries.append((name, defines)), library)[1],
    )
    library = SimpleNamespace(kernels=lambda: len(libraries), add_attention=added.append)
    machine()
    cuda.load_attention.cache_clear()
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    for op, shape in (("sample", (5, 64)), *2 * [("causal_attention", (2, 7, 3, 2, 64))]):
        x.shape = shape
        assert backend.implementation(op, x) == "kernel"
    names = [name for name, _ in libraries]
    assert names == ["tinystory_cuda", "tinystory_attention_bf16_64"] and added == [2]
    assert libraries[1][1] == ["-DTINYSTORY_DTYPE=bf16", "-DTINYSTORY_HEAD_SIZE=64"]
    cuda.load_attention.cache_clear()


def test_an_old_gpu_beside_a_new_one_is_not_compiled_for(machine):
    built = machine(gpus=((9, 0), (7, 5)))
    assert compute.pick_device("auto").type == "cuda" and built == ["9.0"]


def test_reference_needs_no_toolkit(machine):
    machine(gpus=((7, 5),), nvcc="")
    with using("reference"):
        assert compute.pick_device("auto").type == "cuda"


def test_private_functions_of_torch_may_be_missing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not cpu_has_bf16()


def test_bfloat16_is_not_chosen_where_torch_is_kept_from_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for capability, dtype in (("AVX512", torch.bfloat16), ("AVX2", torch.float32)):
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert pick_dtype("auto", torch.device("cpu")) == dtype


@pytest.mark.parametrize("options, code", [([], 0), (["--no-skips"], 1)])
def test_a_skipped_test_fails_if_nothing_may_be_skipped(tmp_path, options, code):
    """`make cuda-build` must not test less than it says."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n\n@pytest.mark.skip\ndef test_it():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", *options, "test_it.py"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}/tests:{ROOT}"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == code, ran.stdout + ran.stderr
