"""A GPU, a CUDA toolkit or a list of architectures that do not fit: the CPU runs, and --device cuda is one sentence."""

import pytest
import torch
from torch.utils import cpp_extension

from tinystory import ops
from tinystory.ops import backend, build, compute, cuda
from tinystory.ops.backend import Backend
from tinystory.run.device import cpu_has_bf16, pick_dtype
from tinystory.run.errors import UserError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A torch with CUDA 13.0, a whole toolkit of 13.1, and one GPU of compute capability 9.0. Returns a setter."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    built = []

    def has(*, gpus=((9, 0),), wanted="", nvcc="13.1", header=True, fails="", torch_cuda="13.0"):
        for cached in (cuda.load, backend.has_kernel):
            cached.cache_clear()
        (home / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
        (home / "bin/nvcc").chmod(0o755)
        if not header:
            (home / "include/cuda_runtime.h").unlink()
        if not nvcc:
            (home / "bin/nvcc").unlink()
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=0: gpus[getattr(d, "index", d) or 0])
        monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # no GPU is here
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        built.clear()

        def compile_for(name, sources, gpus="", toolkit=""):
            if fails:
                raise UserError(f"the kernels do not compile; the compiler says:\n{fails}\n(advice)")
            built.append(gpus)

        monkeypatch.setattr(build, "build", compile_for)
        return built

    assert ops.load(), "the CPU's kernels, before the build is replaced"
    yield has
    for cached in (cuda.load, backend.has_kernel):
        cached.cache_clear()


def test_the_gpus_here_or_those_asked_for_are_compiled_for(machine):
    built = machine(gpus=((9, 0), (8, 6), (9, 0)))
    assert compute.pick_device("auto").type == "cuda" and built == ["8.6;9.0"]
    built = machine(wanted="8.0;9.0+PTX")
    compute.pick_device("cuda")
    assert built == ["8.0;9.0+PTX"]
    machine(gpus=())
    assert cuda.architectures() == (["8.0", "9.0"], [])  # no GPU: what `make cuda-build` compiles for


def test_entries_that_cannot_be_served_are_dropped_and_named_once(machine, capsys):
    built = machine(wanted="7.5 8.0 8.6 9.0+PTX Turing 10.0a")
    compute.pick_device("cuda")
    compute.pick_device("cuda")
    assert built == ["8.0;8.6;9.0+PTX;10.0a"]
    assert capsys.readouterr().err == "tinystory: no CUDA kernels for 7.5, Turing: only for numbers from 8.0 on\n"


BAD = {
    "an old GPU": (dict(gpus=((7, 5),)), "compute capability 7.5, and the CUDA kernels need 8.0 .*--device cpu"),
    "nothing left of the list": (dict(wanted="7.0;7.5"), "not 7.0, 7.5: unset TORCH_CUDA_ARCH_LIST.*--device cpu"),
    "a list without this GPU": (dict(wanted="8.0 8.6"), "9.0, and .* names 8.0, 8.6 only: add 9.0 .*--device cpu"),
    "no nvcc": (dict(nvcc=""), "no CUDA toolkit .*install version 13 and set CUDA_HOME.*--device cpu"),
    "an nvcc without headers": (dict(header=False), "no CUDA toolkit .*install version 13 and set CUDA_HOME"),
    "another major version": (dict(nvcc="12.8"), "has release 12.8: set CUDA_HOME to a toolkit of 13.*--device cpu"),
    "a silent nvcc": (dict(nvcc="unknown"), "an nvcc that does not say its version"),
    "nvcc too old for gcc": (dict(fails="#error -- unsupported GNU version!"), "unsupported GNU(.|\n)*CC=gcc-13"),
    "a GPU that is not NVIDIA's": (dict(torch_cuda=None), "torch is built without CUDA"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_cpu_runs_and_device_cuda_is_one_sentence(machine, capsys, case):
    settings, sentence = BAD[case]
    machine(**settings)
    assert compute.pick_device("cpu").type == "cpu" and backend.has_kernel("sample", "cpu")
    assert capsys.readouterr() == ("", "")
    assert compute.pick_device("auto").type == "cpu"
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=sentence):
        compute.pick_device("cuda")


@pytest.mark.parametrize(
    "entry, on, not_on",
    [
        ("8.0", [(8, 0), (8, 6)], [(9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 9), (9, 0), (12, 1)], []),
        ("9.0+PTX", [(9, 0), (10, 0)], [(8, 9)]),
        ("9.0a", [(9, 0)], [(10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (11, 0)]),
    ],
)
def test_what_is_compiled_for_an_entry_runs_on(entry, on, not_on):
    """CUDA's programming guide: compatibility of cubins, of PTX, and of features that are a family's or a GPU's own."""
    assert all(cuda.runs_on(entry, gpu) for gpu in on) and not any(cuda.runs_on(entry, gpu) for gpu in not_on)


def test_an_old_gpu_beside_a_new_one(machine):
    built = machine(gpus=((7, 5), (9, 0)))
    with pytest.raises(UserError, match=r"compute capability 7\.5"):
        compute.pick_device("cuda:0")
    assert compute.pick_device("cuda:1").type == "cuda" and built == ["9.0"]


def test_reference_needs_no_toolkit(machine):
    machine(gpus=((7, 5),), nvcc="")
    with backend.using(Backend("reference")):
        assert compute.pick_device("auto").type == "cuda"


def test_private_functions_of_torch_may_be_missing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not cpu_has_bf16()


def test_tf32_is_a_choice_on_a_gpu_only():
    for name in ("float32", "bfloat16"):
        assert pick_dtype(name, torch.device("cuda")) == getattr(torch, name)
        assert not torch.backends.cuda.matmul.allow_tf32
    try:
        assert pick_dtype("tf32", torch.device("cuda")) == torch.float32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.raises(UserError, match="needs a GPU"):
        pick_dtype("tf32", torch.device("cpu"))
