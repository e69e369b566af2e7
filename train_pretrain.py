"""Pretrain a student on a corpus, with checkpoints along the way.

python train_pretrain.py                                   the built-in stories, a small student, a few minutes
python train_pretrain.py --corpus my_stories.txt --words 3M --n-embd 256
python train_pretrain.py --preset paper                    GPT-2-small on BabyLM's 100 M words, eleven epochs
"""

import functools
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinystory  # noqa: F401  (before torch, whose import takes seconds: see there)

# isort: split

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import babylm, distributed, memory, ops
from tinystory.babylm import MILESTONES
from tinystory.config import PRETRAIN_PRESETS, InteractConfig, PretrainConfig, as_dict, parse
from tinystory.data.corpus import open_corpus
from tinystory.data.shards import TokenFile, prepare
from tinystory.data.windows import Windows, pack, pieces, places
from tinystory.device import Download, Stop, dtype_name, peak_memory_mb, pick_device, pick_dtype, upload
from tinystory.errors import UserError, command
from tinystory.ops import fastest
from tinystory.paths import usage
from tinystory.report.run import write_report
from tinystory.runlog import RunLog, held
from tinystory.student import checkpoint
from tinystory.student.generate import encode_opening, generate
from tinystory.student.model import Student, StudentConfig
from tinystory.student.muon import MuonAdamW

OPENING = "Once upon a time,"


@torch.no_grad()
def validate(
    student: Student, file: TokenFile, token_sizes: np.ndarray, sequences: int | None, batch: int, packing: str
) -> tuple[float, float]:
    """Nats per token and bits per byte on `sequences` of the file, evenly spread (None: all), sharded over processes.

    token_sizes: (V,) int, bytes per token; packing: of `Windows`."""
    device, context = student.wte.weight.device, student.config.context
    cut = pieces(file, context, packing)
    every = pack(cut, context, np.arange(len(cut)))
    count = min(sequences or len(every), len(every))
    chosen = distributed.shard_strided([every[i * len(every) // count] for i in range(count)])
    nats, tokens, size = torch.zeros((), dtype=torch.float64, device=device), 0, 0  # a GPU runs ahead meanwhile
    for i in range(0, len(chosen), batch):
        rows = [torch.from_numpy(file.tokens[places(cut[row])].astype(np.int64)) for row in chosen[i : i + batch]]
        targets = torch.cat([row[1:] for row in rows])
        tokens += len(targets)
        size += int(token_sizes[targets].sum())
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
        real = pad_sequence([torch.ones(len(row) - 1, dtype=torch.bool) for row in rows], batch_first=True)
        hidden = student.hidden(upload(inputs, device)).flatten(0, 1)
        hidden = hidden.index_select(0, upload(real.flatten().nonzero().flatten(), device))
        nats -= ops.token_logprob(hidden, student.wte.weight, upload(targets, device))[0].double().sum()
    found = torch.tensor([float(nats), tokens, size], dtype=torch.float64)
    total, tokens, size = distributed.all_reduce_sum(found).tolist()
    return total / tokens, total / math.log(2) / size


def learning_rate(config: PretrainConfig, words: int) -> float:
    """Linear warm-up, then linear decay, both as a function of the words read."""
    progress = min(words / config.words, 1.0)
    if progress < config.warmup:
        # No words have been read before the first step: it takes the rate at 1 % of the warm-up rather than 0.
        return config.learning_rate * max(progress / config.warmup, 0.01)
    left = (1 - progress) / (1 - config.warmup)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left


def make_optimizer(student: Student, config: PretrainConfig) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer, and the names of its parameters in order: the matrices, with weight decay, then the vectors,
    without. Of --optimizer muon the blocks' matrices are the first, and embeddings go to AdamW."""
    parameters = dict(student.named_parameters())
    blocks = {name: p for name, p in parameters.items() if p.dim() >= 2 and name.startswith("blocks.")}
    blocks = blocks if config.optimizer == "muon" else {}
    matrices = {name: p for name, p in parameters.items() if p.dim() >= 2 and name not in blocks}
    vectors = {name: p for name, p in parameters.items() if p.dim() < 2}
    groups = [
        dict(params=list(matrices.values()), weight_decay=config.weight_decay),
        dict(params=list(vectors.values()), weight_decay=0.0),
    ]
    options: dict[str, Any] = dict(
        lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    names = [*blocks, *matrices, *vectors]
    if blocks:
        options |= dict(heads=student.config.n_head, dtype=pick_dtype(config.dtype, student.wte.weight.device))
        return MuonAdamW(blocks.values(), groups, **options), names
    return torch.optim.AdamW(groups, **options), names


def costly_muon(student: Student, optimizer: torch.optim.Optimizer, batch_size: int) -> str:
    """What to tell who trains a wide student on few tokens per step: Muon's matmuls, as many for any batch, then take a
    large part of it. "" where they do not. batch_size: sequences per step and process."""
    if not isinstance(optimizer, MuonAdamW):
        return ""
    tokens = batch_size * student.config.context
    read = student.wte.weight.numel() + sum(p.numel() for p in student.blocks.parameters() if p.dim() >= 2)
    share = optimizer.flops() / (6 * read * tokens)  # forward and both gradients: three multiplications and additions
    if share < 0.3:
        return ""
    return (
        f"With {tokens:,} tokens per step, Muon's matmuls come to {share:.1f} times those of the student: a larger "
        "--batch-size, or --optimizer adamw at a tenth of the --learning-rate, takes less time per token."
    )


def train_step(
    student: Student, optimizer: torch.optim.Optimizer, batch: torch.Tensor, config: PretrainConfig,
    dtype: torch.dtype, step: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One update on a batch, (B, T + 1) int64, sharded over processes. Returns the mean loss in nats per token and the
    norm of the gradient.

    Randomness is a function of (seed, step), so a resumed run repeats an unbroken one."""
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(config.seed * 1_000_003 + step + (rank << 40))
    loss = torch.zeros((), device=batch.device)
    with student.lowered(dtype):
        for i, part in enumerate(distributed.shard_strided(batch).split(config.micro_batch_size)):
            with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
                hidden = student.hidden(part[:, :-1], config.dropout, seed=step * config.batch_size + i * world + rank)
                nats = ops.cross_entropy(hidden.flatten(0, 1), student.wte.weight, part[:, 1:].flatten())
            part_loss = nats * (len(part) / len(batch))
            part_loss.backward()
            loss += part_loss.detach()
    distributed.all_reduce_gradients(student.parameters())
    distributed.all_reduce_sum(loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@dataclass
class Launched:
    """A step that a GPU may still be computing. statistics: its loss and gradient norm, (2,) float32."""

    step: int
    words: int
    tokens: int
    rate: float
    began: float
    statistics: Download


def steps_ahead(device: torch.device) -> int:
    """How many steps are launched before the loss of one is waited for, so that a GPU always has work."""
    return 1 if device.type == "cuda" else 0


@command
def main(argv: list[str] | None = None) -> None:
    config: PretrainConfig = parse(PretrainConfig, PRETRAIN_PRESETS, argv)
    distributed.start(config.device)
    with distributed.on_rank0(held(Path(config.out))):
        pretrain(config)


def pretrain(config: PretrainConfig) -> None:
    if config.batch_size < distributed.world_size():
        raise UserError(f"--batch-size must be at least {distributed.world_size()}, the number of processes")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    pytorch_ops = distributed.rank0_value(lambda: fastest.pick(config.pytorch_ops, dtype, device))
    ops.run_by_pytorch(pytorch_ops)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = Path(config.out)
    memory.require_for_pretraining(config, device)
    resume_from = distributed.rank0_value(lambda: checkpoint.newest_whole(run)) if config.resume else None
    if config.resume and resume_from is None:
        print(f"{run} was stopped before its first checkpoint: it starts again")

    # The corpus and the student.
    corpus = open_corpus(config.corpus)
    data = distributed.rank0_first(
        lambda: prepare(corpus, vocab_size=config.vocab_size, val_fraction=config.val_fraction, seed=config.seed)
    )
    if config.preset == babylm.TRACK:
        babylm.check_reading(data.train.word_count, config.words, config.batch_size * config.context)
    tokenizer = data.tokenizer
    windows = Windows(data.train, config.context, config.batch_size, config.seed, config.packing)
    shape = StudentConfig(config.n_layer, config.n_head, config.n_embd, config.context, tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    student = Student(shape, config.weights_init).to(device)
    optimizer, names = make_optimizer(student, config)
    step, words, tokens = 0, 0, 0
    if resume_from:
        checkpoint.restore(student, resume_from)
        state, counters = checkpoint.load_trainer(resume_from, ("step", "words", "tokens", "corpus"))
        if counters["corpus"] != corpus.fingerprint():
            raise UserError(f"the corpus changed since {resume_from} was saved; start a new run with another --out")
        checkpoint.unpack_optimizer(optimizer, names, state)
        step, words, tokens = counters["step"], counters["words"], counters["tokens"]

    resume_step, rank0 = step if config.resume else None, distributed.is_rank0()
    log = distributed.rank0_first(lambda: RunLog(run, resume_step=resume_step, writes=rank0))
    distributed.broadcast_from_rank0(student.parameters())
    resolved = dict(device=str(device), dtype=dtype_name(config.dtype, dtype), pytorch_ops=pytorch_ops)
    log.config(as_dict(config) | resolved)
    size = sum(p.numel() for p in student.parameters())
    print(
        f"student with {size / 1e6:.1f} M parameters, {tokenizer.vocab_size} tokens, {device}, {str(dtype)[6:]}; "
        f"{config.words:,} words to read, {config.words / data.train.word_count:.2f} times the corpus"
    )
    if costly := costly_muon(student, optimizer, config.batch_size // distributed.world_size()):
        print(costly)

    def save(name: str) -> None:
        if not rank0:  # it would drop what rank 0 is writing as left half-written
            return
        facts = dict(words=words, tokens=tokens, corpus=config.corpus, corpus_words=data.train.word_count)
        counters = dict(step=step, words=words, tokens=tokens, corpus=corpus.fingerprint())
        state = checkpoint.pack_optimizer(optimizer, names)
        folder = run / "checkpoints" / name
        checkpoint.save(folder, student, tokenizer, facts=facts, state=state, counters=counters)
        checkpoint.drop_older(folder)

    bar = tqdm(
        total=config.words, initial=words, unit="word", unit_scale=True, desc="reading", mininterval=0.5,
        disable=not rank0,
    )  # fmt: skip

    def prepare_batch(number: int) -> tuple[torch.Tensor, int]:
        tokens, count = windows.batch(number)
        return upload(tokens, device), count

    launched: deque[Launched] = deque()
    seen = 0.0  # when the last step was seen to be finished
    val_loss = val_bits = None

    def record(ahead: int) -> None:
        """Write the metrics of the steps launched, but for the last `ahead`. Waits until they are computed."""
        nonlocal seen, val_loss, val_bits
        while len(launched) > ahead:
            at = launched.popleft()
            loss, grad_norm = at.statistics.wait().tolist()
            began, seen = max(at.began, seen), time.perf_counter()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {at.step}: lower --learning-rate or --resume from the last checkpoint"
                )
            speed = config.batch_size * config.context / (seen - began)
            val_loss = val_bits = None
            finished = at.words >= config.words
            if at.step % config.eval_every == 0 or finished:
                with autocast():
                    count = None if finished else config.eval_sequences
                    val_loss, val_bits = validate(
                        student, data.val, tokenizer.token_sizes, count, config.micro_batch_size, config.packing
                    )
            log.metrics(
                step=at.step,
                words=at.words,
                tokens=at.tokens,
                loss=loss,
                val_loss=val_loss,
                val_bits_per_byte=val_bits,
                lr=at.rate,
                grad_norm=grad_norm,
                tokens_per_s=speed,
                peak_memory_mb=peak_memory_mb(device),
            )
            bar.update(at.words - bar.n)
            shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
            bar.set_postfix(shown if val_loss is None else shown | {"val": f"{val_loss:.3f}"})

    stopping = False
    coming = prepare_batch(step)
    with log, bar, Stop().listening() as stop:
        while words < config.words and not stopping:
            began = time.perf_counter()
            batch, batch_words = coming
            rate = learning_rate(config, words)
            for group in optimizer.param_groups:
                group["lr"] = rate * (config.muon_learning_rate / config.learning_rate if "muon" in group else 1.0)

            statistics = Download(torch.stack(train_step(student, optimizer, batch, config, dtype, step)))
            coming = prepare_batch(step + 1)  # while a GPU computes
            step, before, words, tokens = step + 1, words, words + batch_words, tokens + batch[:, 1:].numel()
            launched.append(Launched(step, words, tokens, rate, began, statistics))
            finished = words >= config.words
            record(0 if finished or step % config.eval_every == 0 else steps_ahead(device))

            stopping = bool(distributed.all_reduce_max(stop.requested))  # a signal to any process stops all of them
            checkpoints = [babylm.milestone_name(milestone) for milestone in MILESTONES if before < milestone <= words]
            if step % config.save_every == 0 or finished or stopping:
                checkpoints.append(f"step_{step:07d}")
            for name in checkpoints:
                record(0)  # first, for a resumed run keeps the metrics up to its checkpoint
                save(name)

    if not rank0:
        return
    report = write_report(run)
    if words < config.words:
        go_on = usage("python train_pretrain.py")
        print(f"stopped after {words:,} words, all saved; go on with: {go_on} --out {run} --resume")
        return
    room = config.context - len(encode_opening(tokenizer, OPENING))
    if room > 0:
        (story,) = generate(
            student, None, tokenizer, [OPENING], first_index=0, max_new_tokens=min(90, config.context // 2, room),
            temperature=InteractConfig.temperature, seed=config.seed,
        )  # fmt: skip
        print(f"\n{OPENING} {story.text}\n")
    if val_loss is not None:  # None of a run that was finished before it was resumed
        print(f"validation loss {val_loss:.3f} nats per token, {val_bits:.3f} bits per byte")
    print(f"report: {report}\nnext:   {usage('python train_interact.py')} --init {checkpoint.newest(run)}")


if __name__ == "__main__":
    main()
