"""What `make gpu-check` would run on a GPU."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lab import bench


def commands() -> str:
    """The recipes, as make would run them."""
    targets = ["gpu-tests", "gpu-memcheck", "gpu-racecheck", "gpu-synccheck", "gpu-speeds"]
    return subprocess.run(
        ["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_its_tests_exist():
    tests = (ROOT / "tests" / "ops" / "test_gpu.py").read_text()
    chosen = re.findall(r'--tool (\w+) .* -k "(.*)"', commands())
    assert [tool for tool, _ in chosen] == ["memcheck", "racecheck", "synccheck"]
    for _, expression in chosen:
        assert all(word in tests for word in expression.split() if word not in ("not", "and"))


def test_its_benchmarks_exist():
    works = re.findall(r'"((?:kernels|rollout|ppo|pretrain) [^"]*)"', commands())
    assert len(works) == 4
    for work in works:
        with pytest.raises(SystemExit) as exit:
            bench.main([*work.split(), "--shape", "small", "--device", "cuda", "--help"])
        assert exit.value.code == 0


def test_without_a_gpu_it_says_so():
    if not torch.cuda.is_available():
        (check,) = re.findall(r"\$\(PY\) (-c \".*\")", (ROOT / "Makefile").read_text())
        run = subprocess.run(
            f"{shlex.quote(sys.executable)} {check}", shell=True, capture_output=True, text=True
        )
        assert run.returncode == 1 and run.stderr == "torch can use no GPU: see scripts/doctor.py\n"
