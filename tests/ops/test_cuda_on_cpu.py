"""The CUDA binding and kernels, built for the SIMT machine and loaded into torch: training and stories as on a GPU."""

import os
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT
from torch.utils.cpp_extension import include_paths, library_paths

SIMT = ROOT / "tests" / "native" / "simt"


@pytest.mark.slow
def test_training_and_stories_on_the_simulated_gpu_are_the_cpus(tmp_path):
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-w", f"-I{SIMT}", f"-I{SIMT}/torch"]
    flags += [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_path("include"))]
    flags += ["-DTORCH_EXTENSION_NAME=simulated", *(f"-L{folder}" for folder in library_paths())]
    sources = [SIMT / "simt.cpp", SIMT / "trace.cpp", SIMT / "torch" / "backend.cpp"]
    library = tmp_path / "simulated.so"
    build = [compiler, *flags, "-shared", "-x", "c++", *sources, *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    build += ["-x", "none", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-o", library]
    built = subprocess.run(list(map(str, build)), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
    script = [sys.executable, str(ROOT / "tests" / "ops" / "cuda_on_cpu.py"), str(library)]
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
