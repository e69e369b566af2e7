"""Speed of training, generation and kernels on this machine, as one JSON line: medians over runs with random weights.

python scripts/bench.py pretrain --shape small              a training step: forward, backward, optimizer
python scripts/bench.py rollout --shape small --batch 64    stories from one opening, without the teacher
python scripts/bench.py ppo --shape gpt2s --batch 16        rollout, reference, four epochs; a constant reward
python scripts/bench.py kernels                             each operator and PyTorch's own, interleaved
python scripts/bench.py growth --runs 3 --plot growth.svg   time per token against batch, context, vocabulary, length
python scripts/bench.py peers --nanogpt DIR --trl PYTHON    ours beside nanoGPT, transformers and TRL, and a table
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tinystory import ops
from tinystory.config import INTERACT_PRESETS, InteractConfig, PretrainConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops import fastest
from tinystory.ops.backend import run_by_pytorch
from tinystory.ops.compute import pick_device
from tinystory.report import charts
from tinystory.rl import ppo
from tinystory.run.device import cpu_has_bf16, now, peak_memory_mb, pick_dtype
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write
from tinystory.student.generate import generate
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.optim import make_optimizer
from tinystory.studies import peers
from tinystory.studies.timing import gemm_limit, held_mb, lap_timer, profile

SHAPES = {
    "small": StudentConfig(n_layer=4, n_head=4, n_embd=256, context=256, vocab_size=8192),
    "gpt2s": StudentConfig(n_layer=12, n_head=12, n_embd=768, context=512, vocab_size=16_000),
}
PROMPT = 20  # tokens
DTYPES = ("float32", "bfloat16")
SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
BATCH = {  # default batch sizes; 64 for the rest
    ("growth", "small"): 16,
    ("growth", "gpt2s"): 4,
    ("pretrain", "small"): 16,
    ("pretrain", "gpt2s"): 4,
    ("kernels", "small"): 16,
    ("kernels", "gpt2s"): 4,
    ("ppo", "gpt2s"): 16,
}


class Words(Tokenizer):
    """A stand-in for a tokenizer: the opening is PROMPT - 1 random tokens, and words are token ids."""

    eos, pad = 2, 1

    def __init__(self, vocab_size: int):
        self.opening = torch.randint(5, vocab_size, (PROMPT - 1,)).tolist()

    def encode(self, text: str) -> list[int]:
        return self.opening

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("kernels", "pretrain", "rollout", "ppo", "growth", "peers"))
    parser.add_argument("--shape", choices=SHAPES, default="small", help="4 layers of 256, or GPT-2-small")
    parser.add_argument("--batch", type=int, help="sequences or stories (default: as in the published figures)")
    parser.add_argument("--new", type=int, default=90, help="tokens per story (default: 90)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the GEMMs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs, after a warm-up run (default: 5)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="chart to write (growth only)")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT (peers only)")
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="of an environment with trl 0.9.4 (peers only)")
    parser.add_argument(
        "--optimizer", choices=("muon", "adamw"), help="of pretraining (default: muon; of peers adamw, as nanoGPT's)"
    )
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--profile", action="store_true", help="then run once more under the profiler")
    a = parser.parse_args(argv)
    config, device = SHAPES[a.shape], pick_device(a.device)
    batch = a.batch or BATCH.get((a.bench, a.shape), 64)
    if min(batch, a.new, a.runs) < 1:
        raise UserError("--batch, --new and --runs must be at least 1")
    if a.plot and (a.bench != "growth" or not a.plot.parent.is_dir()):
        raise UserError(f"--plot {a.plot} needs the bench growth and a folder that exists")
    if a.bench == "peers":
        peers.check(a.nanogpt, a.trl, a.batch, device)
    elif a.nanogpt or a.trl:
        raise UserError("--nanogpt and --trl go with the bench peers")
    if a.bench in ("rollout", "ppo", "peers") and PROMPT + a.new > config.context:
        raise UserError(f"--new {a.new} does not fit: {a.shape} has room for {config.context - PROMPT} tokens")
    dtype = pick_dtype(a.dtype, device)
    facts = dict(bench=a.bench, shape=a.shape, batch=batch, device=device_name(device), dtype=str(dtype)[6:])
    facts |= dict(threads=torch.get_num_threads(), runs=a.runs)
    if device.type == "cpu":
        module = ops.load()
        facts["instructions"] = module.instructions() if module else "PyTorch's"
        if a.bench != "kernels":
            facts["pytorch_ops"] = fastest.pick("auto", dtype, device)
            run_by_pytorch(facts["pytorch_ops"])
    load = os.getloadavg()[0]
    if a.bench == "peers":
        del facts["batch"]
    if a.bench in ("rollout", "ppo", "peers"):
        facts["new"] = a.new
    options = {}
    if a.bench in ("pretrain", "peers"):
        options["optimizer"] = a.optimizer or ("adamw" if a.bench == "peers" else PretrainConfig.optimizer)
    torch.manual_seed(0)
    if not a.json:
        print(f"{a.bench} on {facts['device']}: {a.runs + 1} runs ...", file=sys.stderr)

    run = None
    measured: dict[str, Any]
    if a.bench == "kernels":
        measured = dict(kernels=kernels(config, batch, dtype, device, a.runs))
    elif a.bench == "growth":
        measured = growth(config, batch, a.new, dtype, device, a.runs, quiet=a.json)
        if a.plot:
            atomic_write(a.plot, growth_chart(measured["base"], measured["growth"]))
    elif a.bench == "peers":
        chosen = dict(nanogpt=a.nanogpt, trl=a.trl, quiet=a.json, **options)
        measured = dict(peers=beside_peers(a.shape, a.new, dtype, device, a.runs, **chosen))
    else:
        run = RUNS[a.bench](config, batch, a.new, dtype, device, **options)
        measured = {name: round(value, 4) for name, value in medians(run, a.runs).items()}
        if a.bench in ("pretrain", "rollout"):
            measured["gemm_limit_tokens_per_s"] = gemm_limit(a.bench, config, batch, dtype, device)
    measured |= dict(peak_mb=peak_memory_mb(device), load=round(load, 2))
    print(json.dumps(facts | options | measured), flush=True)
    if a.profile and run:
        profile(run, device)


def medians(run: Callable[[], dict[str, float]], runs: int) -> dict[str, float]:
    laps = [run() for _ in range(runs + 1)][1:]
    return {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}


def pretrain(
    config: StudentConfig, batch: int, new: int, dtype: torch.dtype, device: torch.device,
    optimizer: str = PretrainConfig.optimizer,
) -> Callable:  # fmt: skip
    from train_pretrain import train_step

    options = PretrainConfig(batch_size=batch, optimizer=optimizer)
    student = Student(config).to(device)
    trained_by, _ = make_optimizer(student, options, dtype)
    tokens = torch.randint(0, config.vocab_size, (batch, config.context + 1), device=device)
    count = batch * config.context

    def run() -> dict[str, float]:
        began = now(device)
        train_step(student, trained_by, tokens, options, dtype, step=0)
        seconds = now(device) - began
        return dict(tokens_per_s=count / seconds, step_s=seconds, tokens=count)

    return run


def stories(config: StudentConfig, batch: int, new: int, dtype: torch.dtype, device: torch.device) -> Callable:
    student, head, words = Student(config).to(device), ValueHead(config.n_embd).to(device), Words(config.vocab_size)

    def run() -> dict[str, float]:
        began = now(device)
        with lower(device, dtype):
            written = generate(student, head, words, [""] * batch, first_index=0, max_new_tokens=new, seed=0)
        seconds = now(device) - began
        tokens = sum(len(story.tokens) for story in written)  # random weights: one draw in V ends its story
        return dict(tokens_per_s=tokens / seconds, rollout_s=seconds, tokens=tokens)

    return run


def interact(
    config: StudentConfig, batch: int, new: int, dtype: torch.dtype, device: torch.device, epochs: int = 4
) -> Callable:
    paper = INTERACT_PRESETS["paper"] | dict(epochs=epochs, stories_per_step=batch, max_new_tokens=new)
    options = InteractConfig(**paper)
    student, head, words = Student(config).to(device), ValueHead(config.n_embd).to(device), Words(config.vocab_size)
    reference = Student(config).to(device).requires_grad_(False)
    reference.load_state_dict(student.state_dict())
    optimizer, _ = ppo.make_optimizer(student, head, options)

    def run() -> dict[str, float]:
        began = now(device)
        with lower(device, dtype):
            written = generate(student, head, words, [""] * batch, first_index=0, max_new_tokens=new, seed=0)
        batched = ppo.collate(written, words, device)
        wrote = now(device)
        with lower(device, dtype):
            under_reference = ppo.read_reference(reference, batched, 1.0, options.micro_batch_size, states=False)
        read = now(device)
        learner = ppo.Learner(student, head, optimizer, options, functools.partial(lower, device, dtype))
        ppo.step(learner, batched, under_reference, [0.5] * batch, options.kl_coef)
        done = now(device)
        tokens = sum(len(story.tokens) for story in written)
        parts = dict(rollout_s=wrote - began, update_s=done - wrote, reference_s=read - wrote, tokens=tokens)
        return dict(total_s=done - began) | parts

    return run


RUNS = dict(pretrain=pretrain, rollout=stories, ppo=interact)


# --- peers ------------------------------------------------------------------------------------------------------------
PEERS = {  # bench: (key of its seconds, peer, its modes)
    "pretrain": ("step_s", "nanogpt", tuple(f"{kind}-{dtype}" for kind in ("eager", "compile") for dtype in DTYPES)),
    "rollout": ("rollout_s", "transformers", DTYPES),
    "ppo": ("total_s", "trl", ("",)),
}


def beside_peers(
    shape: str, new: int, dtype: torch.dtype, device: torch.device, runs: int, nanogpt: Path | None, trl: Path | None,
    quiet: bool, optimizer: str,
) -> dict[str, dict]:  # fmt: skip
    """Per bench what peers.take_turns returns, and tokens per second beside those of the GEMMs alone."""
    config, found = SHAPES[shape], {}
    slow = "" if cpu_has_bf16() else "bfloat16"  # emulated: a step takes thirty times as long
    if not quiet:
        print("| | ours | the best peer | ratio | GEMMs alone |", "|---|---|---|---|---|", sep="\n")
    for bench, (seconds, peer, modes) in PEERS.items():
        python, repo = (sys.executable, nanogpt) if peer == "nanogpt" else (str(trl), None)
        if not (nanogpt if peer == "nanogpt" else trl):
            continue
        modes = tuple(mode for mode in modes if not (slow and mode.endswith(slow)))
        batch = BATCH.get((bench, shape), 64)
        options = dict(optimizer=optimizer) if bench == "pretrain" else {}
        run = RUNS[bench](config, batch, new, dtype, device, **options)
        sizes = dict(batch=batch, new=new, prompt=PROMPT, threads=torch.get_num_threads(), repo=repo)
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        words += ["--model", json.dumps(dataclasses.asdict(config))]
        row = dict(batch=batch) | peers.take_turns(lambda: run()[seconds], python, peer, modes, words, runs, quiet)  # noqa: B023
        if bench != "ppo":
            tokens = batch * (config.context if bench == "pretrain" else new)
            row["tokens_per_s"] = round(tokens / row["ours_s"], 1)
            row["gemm_limit_tokens_per_s"] = gemm_limit(bench, config, batch, dtype, device)
        found[bench] = row
        if not quiet:
            print(peers.table_row(bench, row))
    return found


# --- growth -----------------------------------------------------------------------------------------------------------
# Part timed: (function that makes its run, key of its seconds, colour of its curve).
PARTS: dict[str, tuple[Callable[..., Callable], str, str]] = {
    "reading": (pretrain, "step_s", "readability"),
    "writing": (stories, "rollout_s", "creativity"),
    "update": (functools.partial(interact, epochs=1), "update_s", "reward"),  # reference pass and one PPO epoch
}
AXES = {  # quantity varied: (unit, parts that depend on it)
    "batch": ("sequences, or stories", ("reading", "writing", "update")),
    "context": ("tokens per sequence (tokens per step fixed)", ("reading",)),
    "vocabulary": ("tokens", ("reading", "writing", "update")),
    "length": ("tokens per story", ("writing", "update")),
}


def growth(
    config: StudentConfig, batch: int, new: int, dtype: torch.dtype, device: torch.device, runs: int, quiet: bool
) -> dict[str, dict]:
    """Microseconds per token as one quantity at a time goes from 1/8 to 8 times its value in the shape, doubling.

    A longer context has fewer sequences, so that the number of tokens per step is fixed; a longer story has the context
    that it needs."""
    base = dict(batch=batch, context=config.context, vocabulary=config.vocab_size, length=new)
    points = []
    for quantity, (_, parts) in AXES.items():
        for part, power in itertools.product(parts, range(-3, 4)):
            at = base | {quantity: int(base[quantity] * 2.0**power)}
            if quantity == "context":
                at["batch"] = int(batch / 2.0**power)
            if min(at.values()) >= 1:
                points.append((quantity, part, at))
    found: dict[str, dict[str, dict[str, list]]] = {
        quantity: {part: dict(x=[], us_per_token=[]) for part in parts} for quantity, (_, parts) in AXES.items()
    }
    for quantity, part, at in tqdm(points, desc="growth", unit="point", disable=quiet):
        context = at["context"] if part == "reading" else max(config.context, PROMPT + at["length"])
        shape = dataclasses.replace(config, context=context, vocab_size=at["vocabulary"])
        make, seconds, _ = PARTS[part]
        lap = medians(make(shape, at["batch"], at["length"], dtype, device), runs)
        found[quantity][part]["x"].append(at[quantity])
        found[quantity][part]["us_per_token"].append(round(1e6 * lap[seconds] / lap["tokens"], 3))
    return dict(base=base, growth=found)


def growth_chart(base: dict[str, int], found: dict[str, dict]) -> str:
    """The text of an .svg with one panel per quantity: time per token of each part, relative to the shape itself."""
    panels, own = [], {}
    for quantity, parts in found.items():
        lines, curves = [], []
        for part, points in parts.items():
            own[part] = points["us_per_token"][points["x"].index(base[quantity])]
            times = [round(us / own[part], 2) for us in points["us_per_token"]]
            curves.append(times)
            lines.append(charts.Line(points["x"], times, PARTS[part][2], part, smooth=False))
        top = max(2.0, *(1.05 * max(times) for times in curves))  # constant curves look flat
        title = f"Time per token against {quantity}, 1 at {base[quantity]:,}"
        # On a linear axis a linear cost is a straight line; the cost per token falls with the inverse of the batch.
        even = quantity != "batch"
        panels.append(charts.chart(title, lines, y_range=(0, top), x_name=AXES[quantity][0], log_x=not even))
    at_one = ", ".join(f"{part} {charts.number(us)}" for part, us in own.items())
    return charts.standalone(charts.grid(f"Microseconds per token at 1: {at_one}", panels))


# --- kernels ----------------------------------------------------------------------------------------------------------
def kernels(config: StudentConfig, batch: int, dtype: torch.dtype, device: torch.device, runs: int) -> dict[str, dict]:
    """Per operator: median milliseconds of ours and PyTorch's, alternating; their ratio (above 1: ours is faster); peak
    memory beyond the inputs in MB (null if the system does not report it). On a GPU also every backend of SDPA, the
    best of which counts as PyTorch's, and our achieved TFLOP/s or GB/s beside the rate of a GEMM and of a copy."""
    T, H, C, V = config.context, config.n_head, config.n_embd, config.vocab_size
    D, N = C // H, batch * T

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    qkv, hidden, weight = random(batch, T, 3, H, D), random(N, C), random(V, C)
    targets, rows = torch.randint(V, (N,), device=device), torch.arange(64, device=device)
    logits = random(64, V).detach()
    new, prefix, cache = (random(*shape, H, D).detach() for shape in ((64, 3), (PROMPT, 2), (64, T - PROMPT, 2)))
    whole = torch.cat([prefix.expand(64, *prefix.shape), cache], 1)
    lengths = torch.randint((T - PROMPT) // 2, T - PROMPT, (64,), device=device)
    spans = torch.tensor([[0, PROMPT]] * 64, device=device)
    valid = (torch.arange(T, device=device) <= PROMPT + lengths[:, None])[:, None, None]

    def attention(backend: SDPBackend | None = None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if backend is not None:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def log_softmax() -> Tensor:
        log_p = F.linear(hidden, weight).float().log_softmax(-1)
        return log_p.gather(1, targets[:, None]).sum() - 0.01 * (log_p.exp() * log_p).sum()

    def logprob_and_entropy() -> Tensor:
        chosen, entropy = ops.token_logprob(hidden, weight, targets)
        return chosen.sum() + 0.01 * entropy.sum()

    def draw() -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        tokens = p.multinomial(1)
        return log_p.gather(1, tokens), -(p * log_p).sum(-1)

    def decode() -> Tensor:
        whole[rows, PROMPT + lengths] = new[:, 1:]
        k, v = whole.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(new[:, 0, :, None], k, v, attn_mask=valid)

    def backward(f: Callable[[], Tensor]) -> Callable:
        return lambda: f().sum().backward()

    plain_loss = backward(lambda: F.cross_entropy(F.linear(hidden, weight), targets))
    size, forward_flops = dtype.itemsize, 2 * batch * H * T * T * D  # causal: half of two GEMMs
    work: dict[str, dict[str, float]] = {  # floating-point operations, or bytes that must be read
        "attention": dict(flops=3.5 * forward_flops),
        "token_logprob": dict(flops=6 * N * C * V),
        "token_logprob_entropy": dict(flops=6 * N * C * V),
        "cross_entropy": dict(flops=6 * N * C * V),
        "sample": dict(bytes=64 * V * size),
        "decode_attention": dict(bytes=(PROMPT + int(lengths.sum())) * 2 * C * size),
    }
    pairs = {
        "attention": (backward(lambda: ops.causal_attention(qkv)), backward(attention)),
        "token_logprob": (backward(lambda: ops.token_logprob(hidden, weight, targets)[0]), plain_loss),
        "token_logprob_entropy": (backward(logprob_and_entropy), backward(log_softmax)),
        "cross_entropy": (backward(lambda: ops.cross_entropy(hidden, weight, targets)), plain_loss),
        "sample": (lambda: ops.sample(logits, seed=0, rows=rows, step=0), draw),
        "decode_attention": (lambda: ops.decode_attention(new, prefix, spans, cache, lengths), decode),
    }
    lap = lap_timer(device)

    def medians(*functions: Callable) -> list[float]:
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(runs + 1):
            for f, to in zip(functions, times, strict=True):
                for leaf in (qkv, hidden, weight):
                    leaf.grad = None
                to.append(lap(f))
        return [statistics.median(t[1:]) for t in times]

    limits: dict[str, float] = {}
    found: dict[str, dict[str, float | None]] = {}
    if device.type == "cuda":
        big, a = torch.empty(2**28, dtype=torch.uint8, device=device), torch.randn(8192, 8192, device=device).to(dtype)
        gemm, copy = medians(lambda: a @ a, lambda: big.clone())
        limits = dict(flops=2 * 8192**3 / gemm, bytes=2 * 2**28 / copy)
        del big, a
    for name, pair in pairs.items():
        ours, theirs = medians(*pair)
        found[name] = dict(ours_ms=round(1000 * ours, 3))
        if name == "attention" and device.type == "cuda":
            best = {}
            for backend in SDPA_BACKENDS:
                try:
                    (best[backend.name],) = medians(backward(functools.partial(attention, backend)))
                except RuntimeError as error:  # unsupported for this dtype or GPU, or out of memory
                    print(f"SDPA's {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            theirs = min(best.values())
            found[name] |= {f"{key.lower()}_ms": round(1000 * seconds, 3) for key, seconds in best.items()}
        found[name] |= dict(torch_ms=round(1000 * theirs, 3), ratio=round(theirs / ours, 2))
        for kind, amount in work[name].items() if limits else ():
            unit, scale = dict(flops=("tflop_s", 1e12), bytes=("gb_s", 1e9))[kind]
            found[name] |= {unit: round(amount / ours / scale, 1), f"limit_{unit}": round(limits[kind] / scale, 1)}
        found[name] |= dict(zip(("ours_mb", "torch_mb"), (held_mb(f, device) for f in pair), strict=True))
    return found


def lower(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
