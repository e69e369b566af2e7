"""The build's failure modes, each in a cache folder of its own, with compilers that are small shell scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystory import ops
from tinystory.errors import UserError
from tinystory.ops import build, nvcc


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")  # no nvcc
    return tmp_path / "cache" / "kernels"


def compiler(folder, body):
    """A stand-in for c++: the script's body sees the target file as $target."""
    script = folder / "cc"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo stand-in 1.0; exit; fi\n'
        f'while [ "$1" != -o ]; do shift; done; target=$2\n{body}\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_compilers_message_reaches_the_user_and_nothing_stays(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo 'attention.cpp:7: no such intrinsic' >&2; exit 1"))
    with pytest.raises(UserError, match=r"attention\.cpp:7: no such intrinsic(.|\n)*TINYSTORY_KERNELS=reference"):
        build.build()
    assert list(cache.iterdir()) == []
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo library > $target"))
    assert build.build().read_text() == "library\n"


def test_a_second_build_finds_the_first_and_every_input_is_in_the_key(cache, tmp_path, monkeypatch, capsys):
    command = compiler(tmp_path, "echo library > $target")
    monkeypatch.setenv("CXX", command)
    first = build.build()
    assert "compiling the kernels" in capsys.readouterr().err
    assert build.build() == first and capsys.readouterr().err == ""
    keys = {build.cache_key([command], None)}
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    keys.add(build.cache_key([command], None))
    monkeypatch.setattr(build, "cpu", lambda: "another processor")
    keys.add(build.cache_key([command], None))
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    keys.add(build.cache_key([command], None))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/ops.cpp").write_text("int x;")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    keys.add(build.cache_key([command], None))
    assert len(keys) == 5


def test_no_compiler_is_one_sentence_that_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"no C\+\+ compiler found: install one .*apt install g\+\+"):
        build.build()
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(UserError, match="CXX names /nonexistent/c"):
        build.build()
    assert not cache.exists()


def test_a_build_killed_at_any_instant_does_not_hinder_the_next(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, f"touch {tmp_path}/started; sleep 60; echo library > $target"))
    code = "from tinystory.ops import build; build.build()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the build and its compilers: no chance to tidy up
    process.wait()
    left = list(cache.glob("building-*"))
    assert left
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo library > $target"))
    assert build.build().exists()
    hour_ago = time.time() - 4000
    os.utime(left[0], (hour_ago, hour_ago))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo other > $target"))
    build.FLAGS.append("-DOTHER")
    try:
        build.build()
    finally:
        build.FLAGS.remove("-DOTHER")
    assert not left[0].exists()


def test_two_builds_at_once_both_succeed(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, "sleep 0.3; echo library > $target"))
    code = "from tinystory.ops import build; print(build.build())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "library\n"
    assert len(list(cache.iterdir())) == 1


def test_reference_runs_without_a_compiler_and_says_so_once(tmp_path):
    code = (
        "import torch; from tinystory import ops; x = torch.randn(1, 5, 3, 1, 32);"
        "ops.causal_attention(x); ops.causal_attention(x); print(ops.load())"
    )
    env = {**os.environ, "TINYSTORY_KERNELS": "reference", "TINYSTORY_CACHE": str(tmp_path), "PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr.count("TINYSTORY_KERNELS=reference") == 1
    assert list(tmp_path.iterdir()) == []


# --- CUDA, with a stand-in for nvcc -----------------------------------------------------------------------------------


@pytest.fixture
def cuda(cache, tmp_path, monkeypatch):
    """A torch with CUDA 13.0 on a machine without a card, and an nvcc that notes what it is asked to do."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.1, V13.1.1"; exit; fi\n'
        f'echo "$@" >> {tmp_path}/asked\nwhile [ "$1" != -o ]; do shift; done; echo library > $2\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo library > $target"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(nvcc.torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvcc.torch.cuda, "is_available", lambda: False)
    return script


def test_nvcc_compiles_the_cuda_sources_and_links(cuda, cache, tmp_path, capsys):
    assert build.build().read_text() == "library\n"
    assert "with CUDA 13.1 for 8.0, 9.0" in capsys.readouterr().err
    *sources, link = (tmp_path / "asked").read_text().splitlines()
    compiled = {word for line in sources for word in line.split() if word.startswith(str(build.CSRC))}
    assert compiled == {str(p) for end in ("*.cu", "*.cpp") for p in (build.CSRC / "cuda").glob(end)}
    assert all("code=sm_80" in line and "code=sm_90" in line and "-ccbin" in line for line in sources)
    assert "-lc10_cuda" in link and "-cudart=shared" in link and "attention_forward.cu.o" in link


def test_the_architectures_are_those_asked_for_or_those_here(cuda, monkeypatch):
    found = nvcc.find()
    keys = {build.cache_key(["c++"], None), build.cache_key(["c++"], found)}
    monkeypatch.setattr(nvcc.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvcc.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(nvcc.torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6), (9, 0)][i])
    assert nvcc.architectures() == ("8.6", "9.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert nvcc.find().architectures == ("8.0", "9.0+PTX")
    assert nvcc.targets(("9.0+PTX",)) == [f"-gencode=arch=compute_90,code={what}_90" for what in ("sm", "compute")]
    keys.add(build.cache_key(["c++"], nvcc.find()))
    assert len(keys) == 3
    for wrong in ("7.5", "Ampere"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(UserError, match=f"compute capability 8.0 or more.* not '{wrong}'"):
            nvcc.find()


def test_no_nvcc_is_a_sentence_where_a_card_is_used_and_nothing_where_not(cuda, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "load", lambda: True)
    cuda.write_text(cuda.read_text().replace("13.1", "12.9"))
    with pytest.raises(UserError, match=r"torch has CUDA 13.0, but .* is of CUDA 12.9: set CUDA_HOME .*--device cpu"):
        ops.choose.__wrapped__("sample", "cuda")
    cuda.unlink()
    with pytest.raises(UserError, match=r"no nvcc in CUDA_HOME=.*install CUDA's toolkit of version 13 .*--device cpu"):
        ops.choose.__wrapped__("sample", "cuda")
    assert nvcc.find() is None and build.build().exists() and not (tmp_path / "asked").exists()
