"""run.py SCRIPT ARGUMENTS ...: run a script of the project on the simulated device.

CUDA_DEVICE_KERNELS: a library of libraries.kernel_library, with kernels that replace the CPU's.
CUDA_DEVICE_CAPABILITY: "8.0". CUDA_DEVICE_COUNTS: a file for the counts, as JSON; without it they
are printed."""

import json
import os
import runpy
import sys
from pathlib import Path

from machine import PROJECT, device, machine
from runtime import CUDAGraph, install, install_processes, install_project

# isort: split
import torch

sys.path.insert(0, str(PROJECT))


def counts() -> dict:
    """The counts of this process so far. waits, problems: [kind, where, how often]."""
    return dict(
        launches=dict(machine.launches),
        captures=machine.captures,
        replays=machine.replays,
        pools=CUDAGraph.pools,
        reserved=device.memory()[2],
        waits=[[*key, n] for key, n in machine.waits.items()],
        problems=[[*key, n] for key, n in machine.problems.items()],
    )


def main() -> None:
    script, sys.argv = sys.argv[1], sys.argv[1:]
    capability = os.environ.get("CUDA_DEVICE_CAPABILITY", "8.0").split(".")
    install((int(capability[0]), int(capability[1])))
    install_project(os.environ.get("CUDA_DEVICE_KERNELS", ""))
    if "LOCAL_WORLD_SIZE" in os.environ:
        install_processes()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(PROJECT / script), run_name="__main__")
    finally:
        if file := os.environ.get("CUDA_DEVICE_COUNTS"):
            Path(file).write_text(json.dumps(counts()))
        else:
            print(json.dumps(counts(), indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
