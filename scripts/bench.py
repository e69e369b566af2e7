"""Speed of training, generation and kernels on this machine, as one JSON line: medians over runs with random weights.

python scripts/bench.py pretrain --shape small              a training step: forward, backward, optimizer
python scripts/bench.py rollout --shape small --batch 64    stories from one opening, without the teacher
python scripts/bench.py ppo --shape gpt2s --batch 16        rollout, reference, four epochs; a constant reward
python scripts/bench.py kernels                             each operator and PyTorch's own, interleaved
python scripts/bench.py peers --nanogpt DIR --trl PYTHON    ours beside nanoGPT, transformers and TRL
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory import ops
from tinystory.config import PretrainConfig
from tinystory.ops.compute import resolve
from tinystory.run.device import peak_memory_mb
from tinystory.run.errors import UserError, command
from tinystory.run.options import add_number
from tinystory.studies import kernels, peers, timing
from tinystory.studies.timing import PROMPT, SHAPES, WORK, Setup


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=("kernels", *WORK, "peers"))
    add("--shape", choices=SHAPES, default="small", help="4 layers of 256, or GPT-2-small")
    add_number(parser, "--batch", 0, "[0, 1e6]", "sequences or stories; 0: as in the published figures")
    add_number(parser, "--new", 90, "[1, 1e6]", "tokens per story")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the GEMMs")
    add("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    add_number(parser, "--runs", 5, "[1, 1e6]", "timed runs, after a warm-up run")
    add("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT (peers only)")
    add("--trl", type=Path, metavar="PYTHON", help="of an environment with trl 0.9.4 (peers only)")
    add("--optimizer", choices=("muon", "adamw"), help="of pretraining (default: muon; peers: adamw, as nanoGPT's)")
    add("--profile", action="store_true", help="then run once more under the profiler")
    a = parser.parse_args(argv)
    compute = resolve(a.device, a.dtype)
    config, device = SHAPES[a.shape], compute.device
    batch = a.batch or WORK.get(a.bench, WORK["pretrain"])[2][a.shape]
    if a.bench == "peers":
        peers.require(a.nanogpt, a.trl, a.batch, device)
    elif a.nanogpt or a.trl:
        raise UserError("--nanogpt and --trl go with the bench peers")
    writes = a.bench in ("rollout", "ppo", "peers")
    if writes and PROMPT + a.new > config.context:
        raise UserError(f"--new {a.new} does not fit: {a.shape} has room for {config.context - PROMPT} tokens")
    setup = Setup(config, batch, a.new, compute)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts: dict[str, Any] = dict(bench=a.bench, shape=a.shape, device=name, dtype=str(compute.dtype)[6:], runs=a.runs)
    facts |= dict(threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2))
    facts |= ({} if a.bench == "peers" else dict(batch=batch)) | (dict(new=a.new) if writes else {})
    if device.type == "cpu":
        module = ops.load()
        facts["instructions"] = module.instructions() if module else "PyTorch's"
    options = {}
    if a.bench in ("pretrain", "peers"):
        options["optimizer"] = a.optimizer or ("adamw" if a.bench == "peers" else PretrainConfig.optimizer)
    torch.manual_seed(0)
    print(f"{a.bench} on {name}: {a.runs + 1} runs ...", file=sys.stderr)
    if a.bench == "kernels":
        facts["kernels"] = kernels.compare(setup, a.runs)
    elif a.bench == "peers":
        facts["peers"] = peers.compare(setup, a.shape, a.runs, a.nanogpt, a.trl, **options)
    else:
        run = WORK[a.bench][0](setup, **options)
        facts |= {key: round(median, 4) for key, median in timing.medians(run, a.runs).items()}
        if a.bench != "ppo":
            facts["gemm_limit_tokens_per_s"] = timing.gemm_limit(a.bench, setup)
    print(json.dumps(facts | options | dict(peak_mb=peak_memory_mb(device))), flush=True)
    if a.profile and a.bench in WORK:
        timing.profile(run, device)


if __name__ == "__main__":
    main()
