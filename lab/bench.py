"""Speed of training, generation and kernels on this machine, as one JSON line: medians over runs
with random weights.

python lab/bench.py pretrain --shape small            a training step
python lab/bench.py rollout --shape small --batch 64  stories from one opening, no teacher
python lab/bench.py ppo --shape gpt2s --batch 16      rollout, reference, four epochs; reward constant
python lab/bench.py kernels                           each operator and PyTorch's own, interleaved
python lab/bench.py peers --nanogpt DIR --trl PYTHON  beside nanoGPT, transformers and TRL
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch
from tqdm import tqdm

from lab import kernels, timing
from lab.timing import PROMPT, SHAPES, WORK, Setup
from tinystory import ops
from tinystory.config import PretrainConfig
from tinystory.ops.compute import resolve
from tinystory.run.device import cpu_has_bf16, peak_memory_mb
from tinystory.run.errors import UserError, command
from tinystory.run.options import add_number, script_parser
from tinystory.run.paths import ROOT


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("bench", choices=("kernels", *WORK, "peers"))
    add("--shape", choices=SHAPES, default="small", help="4 layers of 256, or GPT-2-small")
    add_number(
        parser, "--batch", 0, "[0, 1e6]", "sequences or stories; 0: as in the published figures"
    )
    add_number(parser, "--new", 90, "[1, 1e6]", "tokens per story")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the GEMMs",
    )
    add("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    add_number(parser, "--runs", 5, "[1, 1e6]", "timed runs, after a warm-up run")
    add("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT (peers only)")
    add("--trl", type=Path, metavar="PYTHON", help="of an environment with trl 0.9.4 (peers only)")
    add(
        "--optimizer",
        choices=("muon", "adamw"),
        help="of pretraining (default: muon; peers: adamw, as nanoGPT's)",
    )
    a = parser.parse_args(argv)
    compute = resolve(a.device, a.dtype)
    config, device = SHAPES[a.shape], compute.device
    batch = a.batch or WORK.get(a.bench, WORK["pretrain"])[2][a.shape]
    if a.bench == "peers":
        require_peers(a, device)
    elif a.nanogpt or a.trl:
        raise UserError("--nanogpt and --trl go with the bench peers")
    writes = a.bench in ("rollout", "ppo", "peers")
    if writes and PROMPT + a.new > config.context:
        raise UserError(
            f"--new {a.new} does not fit: {a.shape} has room for {config.context - PROMPT} tokens"
        )
    setup = Setup(config, batch, a.new, compute)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts: dict[str, Any] = dict(
        bench=a.bench, shape=a.shape, device=name, dtype=str(compute.dtype)[6:], runs=a.runs
    )
    facts |= dict(threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2))
    facts |= ({} if a.bench == "peers" else dict(batch=batch)) | (dict(new=a.new) if writes else {})
    if device.type == "cpu":
        module = ops.load()
        facts["instructions"] = module.instructions() if module else "PyTorch's"
    optimizers = {"pretrain": PretrainConfig.optimizer, "peers": "adamw"}
    options = {"optimizer": a.optimizer or optimizers[a.bench]} if a.bench in optimizers else {}
    torch.manual_seed(0)
    print(f"{a.bench} on {name}: {a.runs + 1} runs ...", file=sys.stderr)
    if a.bench == "kernels":
        facts["kernels"] = kernels.compare(setup, a.runs)
    elif a.bench == "peers":
        facts["peers"] = compare_peers(setup, a, **options)
    else:
        run = WORK[a.bench][0](setup, **options)
        laps = [run() for _ in range(a.runs + 1)][1:]  # the first warms up
        facts |= {key: round(median(lap[key] for lap in laps), 4) for key in laps[0]}
        if a.bench != "ppo":
            facts["gemm_limit_tokens_per_s"] = timing.gemm_limit(a.bench, setup)
    print(json.dumps(facts | options | dict(peak_mb=peak_memory_mb(device))), flush=True)


# ---- other programs, timed in turns with ours ----------------------------------------------------


@contextlib.contextmanager
def peer(python: str, name: str, settings: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds of a run in a process of lab/peer.py, or
    raises UserError."""
    argv, pipe = (
        [python, str(ROOT / "lab/peer.py"), name, json.dumps(settings)],
        subprocess.PIPE,
    )
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)

    def run() -> float:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its output has ended too
            print("run", file=process.stdin, flush=True)
        if line := process.stdout.readline():
            return float(line)
        raise UserError(f"the peer {name} ended with status {process.wait()}: its message is above")

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def require_peers(a: argparse.Namespace, device: torch.device) -> None:
    if device.type != "cpu" or a.batch:
        raise UserError(
            "peers are timed on the CPU, with the batch sizes of the published figures: leave out --batch"
        )
    files = [path for path in (a.nanogpt and a.nanogpt / "model.py", a.trl) if path]
    if not files or not all(path.is_file() for path in files):
        raise UserError(
            "peers needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT with its model.py, or --trl PYTHON, the "
            "interpreter of an environment with trl 0.9.4 and transformers 4.53, or both"
        )


def compare_peers(setup: Setup, a: argparse.Namespace, optimizer: str) -> dict[str, dict[str, Any]]:
    """Per work with a given peer: median seconds of ours and, by dtype, of the peer, in turns so
    that a machine's drift affects both; ratio: median over turns of the peer's seconds, in its
    faster dtype, over ours (above 1: ours is faster)."""
    results: dict[str, dict[str, Any]] = {}
    peers = {"pretrain": ("nanogpt", sys.executable)} if a.nanogpt else {}
    peers |= {"rollout": ("transformers", str(a.trl)), "ppo": ("trl", str(a.trl))} if a.trl else {}
    for work, (name, python) in peers.items():
        make_run, key, batches = WORK[work]
        setup = dataclasses.replace(setup, batch=batches[a.shape])
        ours = make_run(setup, optimizer=optimizer) if work == "pretrain" else make_run(setup)
        settings = dict(
            model=dataclasses.asdict(setup.config), batch=setup.batch, new=setup.new, prompt=PROMPT
        )
        settings |= dict(threads=torch.get_num_threads(), repo=str(a.nanogpt))
        # TRL computes in float32. Emulated bfloat16 makes a step thirty times as long.
        dtypes = ("float32", "bfloat16") if name != "trl" and cpu_has_bf16() else ("float32",)
        with contextlib.ExitStack() as stack:
            theirs = [
                stack.enter_context(peer(python, name, settings | {"dtype": dtype}))
                for dtype in dtypes
            ]
            turns = tqdm(range(a.runs + 1), desc=f"{name} and ours", unit="turn", disable=None)
            # the first warms up
            laps = [[ours()[key], *(run() for run in theirs)] for _ in turns][1:]
        ours_s, *peer_s = (round(median(column), 4) for column in zip(*laps, strict=True))
        best = peer_s.index(min(peer_s))
        ratio = round(median(lap[1 + best] / lap[0] for lap in laps), 2)
        results[work] = dict(
            batch=setup.batch, ours_s=ours_s, peer=name, best=dtypes[best], ratio=ratio
        )
        results[work]["peer_s"] = dict(zip(dtypes, peer_s, strict=True))
    return results


if __name__ == "__main__":
    main()
