"""The build's failure modes, each in a cache folder of its own, with compilers that are small shell scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystory.errors import UserError
from tinystory.ops import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
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
    keys = {build.cache_key([command])}
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    keys.add(build.cache_key([command]))
    monkeypatch.setattr(build, "cpu", lambda: "another processor")
    keys.add(build.cache_key([command]))
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    keys.add(build.cache_key([command]))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/ops.cpp").write_text("int x;")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    keys.add(build.cache_key([command]))
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
