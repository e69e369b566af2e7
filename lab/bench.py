"""Speed of training, generation and kernels on this machine, as one JSON line: medians over runs
with random weights.

python lab/bench.py pretrain --shape small            a training step
python lab/bench.py rollout --shape small --batch 64  stories from one opening, no teacher
python lab/bench.py ppo --shape gpt2s --batch 16      rollout, reference, four epochs; reward constant
python lab/bench.py kernels                           our operators and PyTorch's, interleaved
python lab/bench.py peers --nanogpt DIR --trl PYTHON  compared with nanoGPT, transformers and TRL
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

from lab import kernel_times, timing
from lab.timing import PROMPT, SHAPES, WORK, Setup, Work
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
    add(
        "--shape",
        choices=SHAPES,
        default="small",
        help="small: 4 layers of 256; gpt2s: GPT-2-small",
    )
    add_number(
        parser,
        "--batch",
        0,
        "[0, 1e6]",
        "number of sequences or stories; 0: as in lab/results/speed.md",
    )
    add_number(parser, "--new", 90, "[1, 1e6]", "tokens per story")
    add(
        "--dtype",
        choices=("auto", "float32", "tf32", "bfloat16"),
        default="auto",
        help="dtype of the GEMMs",
    )
    add("--device", default="auto", help="device: auto, cpu, cuda or cuda:N (default: auto)")
    add_number(parser, "--runs", 5, "[1, 1e6]", "number of timed runs, after a warm-up run")
    add("--nanogpt", type=Path, metavar="DIR", help="folder of a clone of nanoGPT (peers only)")
    add(
        "--trl",
        type=Path,
        metavar="PYTHON",
        help="Python interpreter of an environment with trl 0.9.4 (peers only)",
    )
    add(
        "--optimizer",
        choices=("muon", "adamw"),
        help="optimizer of pretraining (default: muon; for peers adamw, as in nanoGPT)",
    )
    args = parser.parse_args(argv)
    compute = resolve(args.device, args.dtype)
    device = compute.device
    config = SHAPES[args.shape]
    if args.bench == "peers":
        require_peers(args, device)
    elif args.nanogpt or args.trl:
        raise UserError("--nanogpt and --trl are only for `lab/bench.py peers`")
    writes = args.bench in ("rollout", "ppo", "peers")
    if writes and PROMPT + args.new > config.context:
        raise UserError(
            f"--new {args.new} does not fit: {args.shape} has room for {config.context - PROMPT} tokens"
        )
    work = WORK.get(args.bench, WORK["pretrain"])
    setup = Setup(config, args.batch or work.batch[args.shape], args.new, compute)
    optimizers = {"pretrain": PretrainConfig.optimizer, "peers": "adamw"}
    options = {}
    if args.bench in optimizers:
        options["optimizer"] = args.optimizer or optimizers[args.bench]
    facts = conditions(args, setup)
    if args.bench != "peers":
        facts["batch"] = setup.batch
    if writes:
        facts["new"] = args.new
    if device.type == "cpu":
        module = ops.load()
        facts["instructions"] = module.instructions() if module else "PyTorch's"

    torch.manual_seed(0)
    print(f"{args.bench} on {facts['device']}: {args.runs + 1} runs ...", file=sys.stderr)
    if args.bench == "kernels":
        facts["kernels"] = kernel_times.compare(setup, args.runs)
    elif args.bench == "peers":
        facts["peers"] = compare_peers(setup, args, options["optimizer"])
    else:
        facts |= median_lap(work.make_run(setup, **options), args.runs)
        if args.bench != "ppo":
            facts["gemm_limit_tokens_per_s"] = timing.gemm_limit(args.bench, setup)
    facts |= options
    facts["peak_mb"] = peak_memory_mb(device)
    print(json.dumps(facts), flush=True)


def conditions(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    device = setup.compute.device
    return {
        "bench": args.bench,
        "shape": args.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": setup.compute.recorded["dtype"],
        "runs": args.runs,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def median_lap(run: timing.Run, runs: int) -> dict[str, float]:
    """The medians of the numbers that `run` returns, over `runs` runs after a warm-up."""
    run()  # warms up
    laps = [run() for _ in range(runs)]
    return {key: round(median(lap[key] for lap in laps), 4) for key in laps[0]}


# ---- other programs, interleaved with ours ----------------------------------------------------


@contextlib.contextmanager
def peer(python: str, name: str, settings: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds of one run in a process of lab/peer.py, or raises
    UserError."""
    argv = [python, str(ROOT / "lab/peer.py"), name, json.dumps(settings)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)

    def run() -> float:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its output has ended too
            print("run", file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise UserError(
                f"the peer {name} ended with status {process.wait()}: see the peer's message above"
            )
        return float(line)

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def require_peers(args: argparse.Namespace, device: torch.device) -> None:
    if device.type != "cpu" or args.batch:
        raise UserError(
            "peers are timed on the CPU, with the batch sizes of the published figures: leave out --batch"
        )
    files = []
    if args.nanogpt:
        files.append(args.nanogpt / "model.py")
    if args.trl:
        files.append(args.trl)
    if not files or not all(path.is_file() for path in files):
        raise UserError(
            "peers needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT with its model.py, or --trl PYTHON, the "
            "interpreter of an environment with trl 0.9.4 and transformers 4.53, or both"
        )


def compare_peers(
    setup: Setup, args: argparse.Namespace, optimizer: str
) -> dict[str, dict[str, Any]]:
    """For each kind of work with a given peer: median seconds of our program and, by dtype, of the
    peer; `ratio`: median over turns of the peer's seconds in its faster dtype, divided by ours
    (above 1: ours is faster). The runs are interleaved, so that a drift of the machine affects both
    programs."""
    results = {}
    if args.nanogpt:
        results["pretrain"] = compare_peer(
            "nanogpt", sys.executable, setup, args, WORK["pretrain"], optimizer=optimizer
        )
    if args.trl:
        python = str(args.trl)
        results["rollout"] = compare_peer("transformers", python, setup, args, WORK["rollout"])
        results["ppo"] = compare_peer("trl", python, setup, args, WORK["ppo"])
    return results


def compare_peer(
    name: str, python: str, setup: Setup, args: argparse.Namespace, work: Work, **options: str
) -> dict[str, Any]:
    """An entry of `compare_peers`. options: arguments of work.make_run."""
    setup = dataclasses.replace(setup, batch=work.batch[args.shape])
    ours = work.make_run(setup, **options)
    settings = {
        "model": dataclasses.asdict(setup.config),
        "batch": setup.batch,
        "new": setup.new,
        "prompt": PROMPT,
        "threads": torch.get_num_threads(),
        "repo": str(args.nanogpt),
    }
    dtypes = ["float32"]
    # TRL computes in float32. Emulated bfloat16 makes a step thirty times as long.
    if name != "trl" and cpu_has_bf16():
        dtypes.append("bfloat16")
    our_laps = []
    peer_laps: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    with contextlib.ExitStack() as stack:
        runs = {}
        for dtype in dtypes:
            process = peer(python, name, settings | {"dtype": dtype})
            runs[dtype] = stack.enter_context(process)
        for _ in tqdm(range(args.runs + 1), desc=f"{name} and ours", unit="turn", disable=None):
            our_laps.append(ours()[work.seconds_key])
            for dtype, run in runs.items():
                peer_laps[dtype].append(run())

    # The first turn is a warm-up.
    peer_s = {dtype: round(median(laps[1:]), 4) for dtype, laps in peer_laps.items()}
    best = min(dtypes, key=lambda dtype: peer_s[dtype])
    turns = zip(peer_laps[best][1:], our_laps[1:], strict=True)
    return {
        "batch": setup.batch,
        "ours_s": round(median(our_laps[1:]), 4),
        "peer": name,
        "best": best,
        "ratio": round(median(peer_lap / our_lap for peer_lap, our_lap in turns), 2),
        "peer_s": peer_s,
    }


if __name__ == "__main__":
    main()
