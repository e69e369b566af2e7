"""The GPU's host path on the simulated device, in processes of their own: README.md says how it works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA, in whose place nothing can be put"),
    pytest.mark.skipif(sys.platform != "linux", reason="the simulated device has been built on Linux alone"),
]


def on_device(*arguments: object, **env: str) -> str:
    """The output of pytest with these arguments, on the simulated device; it must succeed."""
    path = os.pathsep.join(map(str, (HERE, ROOT)))
    env = os.environ | {"PYTHONPATH": path, "TINYSTORY_KERNELS": "ours", "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_both_commands_whole_as_on_the_cpu():
    on_device(HERE / "whole_runs.py")
