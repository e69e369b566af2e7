"""The GPU's host path on the simulated device, in processes of their own: README.md says how it
works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, metrics
from libraries import kernel_library
from planted_bugs import LISTS, misfits, read_bugs

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is not None,
        reason="this torch has CUDA, in whose place nothing can be put",
    ),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the simulated device has been built on Linux alone"
    ),
]


def on_device(*arguments: object, **env: str) -> str:
    """The output of pytest with these arguments, on the simulated device; it must succeed."""
    path = os.pathsep.join(map(str, (HERE, ROOT)))
    env = (
        os.environ | {"PYTHONPATH": path, "TINYSTORY_KERNELS": "ours", "OMP_NUM_THREADS": "1"} | env
    )
    command = [sys.executable, *"-m pytest -p plugin -p no:cacheprovider".split()]
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", LISTS)
def test_planted_bugs_fit_the_project(kind):
    bugs = read_bugs(kind)
    assert bugs and [misfit for bug in bugs for misfit in misfits(bug)] == []


@pytest.mark.slow
def test_docs_have_the_table_on_paper():
    """Versions of torch differ by a few launches."""
    env = os.environ | {"TINYSTORY_KERNELS": "ours"}
    done = subprocess.run(
        [sys.executable, ROOT / "lab" / "on_paper.py"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    documented = {
        line.split("|")[1]: line
        for line in (ROOT / "lab/gpu.md").read_text().splitlines()
        if "|" in line
    }
    for line in done.stdout.splitlines()[2:]:
        numbers = [
            [float(x) for x in re.findall(r"[\d.]+", row.replace(",", ""))]
            for row in (line, documented[line.split("|")[1]])
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.03), line


def test_both_commands_whole_as_on_the_cpu():
    on_device(HERE / "whole_runs.py")


@pytest.mark.slow
def test_every_learner_dtype_and_script():
    on_device(HERE / "more_runs.py")


@pytest.mark.slow
def test_the_cuda_kernels_under_the_whole_host_path():
    kernels = str(kernel_library())
    on_device(HERE / "more_runs.py", CUDA_DEVICE_KERNELS=kernels)
    names = "copies_of_weights or the_sum_and_its_norm or gradient_wide or several_chunks and not 9000 or nan"
    few = ["-m", "gpu", "-k", names]
    on_device(ROOT / "tests/ops/test_gpu.py", *few, CUDA_DEVICE_KERNELS=kernels)


# A device-side assertion, torch.compile, a traced operator, or what the CPU's kernels allow or
# refuse.
NEED_A_CARD = "device_sees or opcheck or compile or cannot_be_drawn or not_supported"


@pytest.mark.slow
def test_the_tests_of_a_gpu_that_need_no_card():
    on_device(
        ROOT / "tests/ops/test_gpu.py",
        "-m",
        "gpu",
        "-k",
        f"not ({NEED_A_CARD})",
        TINYSTORY_TEST_SHAPES="4",
    )


@pytest.mark.slow
def test_two_processes_train_as_one(place, tmp_path):
    """Under torchrun, a device for each."""
    shape = "cuda --dtype float32 --words 1200 --batch-size 4 --micro-batch-size 2".split()
    script = [HERE / "run.py", "train_pretrain.py", "--corpus", place / "corpus.txt"]
    script += [*SMALL[:-1], *shape, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TINYSTORY_KERNELS": "ours",
        "OMP_NUM_THREADS": "1",
    }
    for name, start in (("one", []), ("two", torchrun)):
        command = [sys.executable, *start, *script, tmp_path / name]
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-4000:]
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


@pytest.mark.slow
def test_on_a_gpu_that_is_too_old_for_the_kernels_the_reference_runs(place, tmp_path):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TINYSTORY_KERNELS": "reference",
        "CUDA_DEVICE_CAPABILITY": "7.5",
    }
    script = [HERE / "run.py", "train_pretrain.py", "--corpus", place / "corpus.txt"]
    options = [*SMALL[:-1], "cuda", "--words", "400", "--out", tmp_path / "p"]
    done = subprocess.run(
        [*map(str, (sys.executable, *script, *options))],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    recorded = json.loads((tmp_path / "p/config.json").read_text())["options"]
    assert recorded["device"] == "cuda" and recorded["dtype"] == "float32"
