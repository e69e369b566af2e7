"""Tests and benchmarks of the CUDA kernels on this machine's GPU, in under nine minutes: `make gpu-check`.

    python scripts/gpu_check.py --out build/gpu-check.json

The GPU tests, the same under compute-sanitizer, and speeds: kernels beside PyTorch's (every backend of its attention),
pretraining beside its matmuls alone, rollout and PPO. OUT has every command with its output and lines of JSON. A
command that fails does not stop the next; one for which no time is left is listed as not run.
Exits with 1 unless every test and sanitizer passed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import add_number
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write
from tinystory.run.paths import ROOT

TESTS = ("-m", "pytest", "-q", "-m", "gpu")
SANITIZERS = {  # tool: the tests that it runs
    "memcheck": "not device_sees and not interaction",
    "racecheck": "same_bits",
    "synccheck": "same_bits",
}
BENCHES = {  # with options
    "kernels": ("--batch", "32", "--runs", "20"),
    "rollout": ("--batch", "360"),
    "ppo": ("--batch", "64"),
    "pretrain": ("--batch", "32"),
}


def commands() -> dict[str, list[str]]:
    """The command line of each check, the most informative first."""
    out = {"tests": [sys.executable, *TESTS]}
    for tool, tests in SANITIZERS.items():
        out[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *out["tests"], "-k", tests]
    for bench, options in BENCHES.items():
        for shape in ("small", "gpt2s"):
            argv = [sys.executable, "scripts/bench.py", bench, "--shape", shape, "--device", "cuda", *options]
            out[f"{bench} {shape}"] = argv
    return out


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check.json"), help="file to write")
    add_number(parser, "--minutes", 9.0, "(0, 1e6]", "for all of it")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU that this torch can use; scripts/doctor.py says what it sees")
    gpu = torch.cuda.get_device_properties(0)
    facts = dict(card=gpu.name, capability=f"{gpu.major}.{gpu.minor}", memory_gib=round(gpu.total_memory / 2**30, 1))
    facts |= dict(torch=torch.__version__, cuda=torch.version.cuda)
    results = run_all(commands(), options.minutes * 60)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, json.dumps(dict(facts, results=results), indent=1) + "\n")
    print("", *(f"{name}: {outcome(result)}" for name, result in results.items()), options.out, sep="\n")
    if any(results[name]["rc"] != 0 for name in ("tests", *SANITIZERS)):
        raise SystemExit(1)


def run_all(commands: Mapping[str, Sequence[str]], seconds: float) -> dict[str, dict[str, Any]]:
    """Run each command within the seconds that are left for all, and print the end of its output. Per name: the
    command, rc (null: not run, or stopped for time), why if so, seconds, output, and `rows`, its lines of JSON."""
    deadline, results = time.monotonic() + seconds, {}
    for name, argv in commands.items():
        print(f"\n== {name}: {' '.join(argv)}", flush=True)
        start = time.monotonic()
        result: dict[str, Any] = dict(command=" ".join(argv), rc=None, why="", seconds=0.0, output="", rows=[])
        results[name] = result
        if shutil.which(argv[0]) is None:
            result["why"] = f"there is no {argv[0]}"
        elif start >= deadline:
            result["why"] = "no time was left"
        else:
            # A sanitizer makes a kernel tens of times slower.
            environment = os.environ | ({"TINYSTORY_TEST_SHAPES": "12"} if name in SANITIZERS else {})
            streams: dict[str, Any] = dict(
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            process = subprocess.Popen(argv, cwd=ROOT, env=environment, start_new_session=True, **streams)
            try:
                result["output"], _ = process.communicate(timeout=deadline - start)
                result["rc"] = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                result["output"], _ = process.communicate()
                result["why"] = "stopped when the time was over"
            result["seconds"] = round(time.monotonic() - start, 1)
            lines = result["output"].splitlines()
            result["rows"] = [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("}")]
        print(result["output"][-2000:] or result["why"], flush=True)
    return results


def outcome(result: Mapping[str, Any]) -> str:
    ended = {0: "passed", None: result["why"]}.get(result["rc"], f"failed ({result['rc']})")
    return f"{ended}, {result['seconds']} s"


if __name__ == "__main__":
    main()
