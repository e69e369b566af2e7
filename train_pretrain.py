"""Pretrain a student on a corpus, with checkpoints along the way."""

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from tinystory import ops
from tinystory.config import (
    PRETRAIN_PRESETS,
    InteractConfig,
    PretrainConfig,
    given_again,
    parse,
)
from tinystory.data import babylm
from tinystory.data.corpus import MARKER, open_corpus
from tinystory.data.openings import load_openings
from tinystory.data.shards import Dataset, TokenFile, prepare
from tinystory.data.tokenizer import Tokenizer
from tinystory.data.windows import Curriculum, Windows
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import Compute, resolve
from tinystory.report.run import live_report
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import Download, peak_memory_mb, upload
from tinystory.run.errors import Stop, UserError, command
from tinystory.run.log import RunLog
from tinystory.run.paths import hint
from tinystory.run.records import EVALUATIONS, Record, read_metrics
from tinystory.run.step_log import Progress, StepLog
from tinystory.run.terminal import story_text, wrapped
from tinystory.run.text import printable
from tinystory.student import checkpoint, hf, memory
from tinystory.student.generate import encode_opening, generate
from tinystory.student.model import Student, student_config, to_device
from tinystory.student.optim import make_optimizer, set_learning_rate

OPENING = "Once upon a time,"  # of the story that the student tells at each validation
STORY_TOKENS = 80
LONG_DOCUMENT = 10  # sequences
# What to do when an update makes weights that are not finite.
TOO_LARGE = "lower --learning-rate or --muon-learning-rate, or give --grad-clip 1"


@dataclass
class PretrainState:
    """What a checkpoint holds besides weights and optimizer state. words, tokens: trained on,
    counting repeats."""

    corpus: str  # fingerprint
    step: int = 0
    words: int = 0
    tokens: int = 0


@command
def main(argv: list[str] | None = None) -> None:
    config: PretrainConfig = parse(PretrainConfig, PRETRAIN_PRESETS, argv)
    distributed.start(config.device)
    with distributed.run_folder(config):
        run = open_run(config)
        pretrain(run)
        if distributed.is_rank0():
            report(run)


@dataclass
class PretrainingRun:
    """What a run holds: the student with its optimizer and state, the corpus in tokens, and the
    sequences of each step. steps: metrics of steps that a GPU may still be computing."""

    config: PretrainConfig
    compute: Compute
    data: Dataset
    windows: Windows | Curriculum
    student: Student
    optimizer: Optimizer
    state: PretrainState
    log: RunLog
    bar: Progress
    steps: StepLog


def pretrain(run: PretrainingRun) -> None:
    """Train until the last word or a signal."""
    config, state, steps = run.config, run.state, run.steps
    device = run.compute.device
    folder = run.log.folder
    next_batch = load_batch(run, state.step)
    writes = distributed.is_rank0()
    with run.log, Stop().listening() as stop, live_report(folder, writes) as update_report, run.bar:
        if state.step == 0:
            tell_story(run)
        # A signal to any process stops all of them.
        while state.words < config.words and not distributed.all_reduce_max(stop.requested):
            began = time.perf_counter()
            batch, words = next_batch
            rate = set_learning_rate(run.optimizer, config, state.words)
            loss, grad_norm = train_step(
                run.student, run.optimizer, batch, config, run.compute.dtype, state.step
            )
            statistics = Download(torch.stack([loss, grad_norm]))
            next_batch = load_batch(run, state.step + 1)  # while a GPU computes

            words_before = state.words
            state.step += 1
            state.words += words
            state.tokens += batch[:, 1:].numel()
            steps.launch(
                began,
                statistics,
                step=state.step,
                words=state.words,
                tokens=state.tokens,
                lr=rate,
                peak_memory_mb=peak_memory_mb(device),
            )

            if state.step % config.eval_every == 0 or state.words >= config.words:
                steps.write(0, lambda: validation(run))
                tell_story(run)
            else:
                steps.write(steps_ahead(device))
            passed = [m for m in babylm.MILESTONES if words_before < m <= state.words]
            names = list(map(babylm.milestone_name, passed))
            if state.step % config.save_every == 0:
                names.append(f"step_{state.step:07d}")
            for name in names:
                steps.write(0)  # first: a resumed run keeps the metrics up to its checkpoint
                save(run, name)
            update_report()
        steps.write(0)
        save(run, f"step_{state.step:07d}")


# ---- the stages of a step ------------------------------------------------------------------------


def load_batch(run: PretrainingRun, number: int) -> tuple[Tensor, int]:
    """A step's sequences, (B, T + 1) int64 on the device, and the words in them."""
    tokens, words = run.windows.batch(number)
    return upload(tokens, run.compute.device), words


def steps_ahead(device: torch.device) -> int:
    """Steps launched before waiting for the loss of one, so that a GPU always has work."""
    return 1 if device.type == "cuda" else 0


def train_step(
    student: Student,
    optimizer: Optimizer,
    batch: Tensor,
    config: PretrainConfig,
    dtype: torch.dtype,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One update on a batch, (B, T + 1) int64, sharded over processes. dtype: for the matmuls.
    Returns the mean loss in nats per token, over all processes, and the gradient norm. Randomness
    is a function of (seed, step), so a resumed run repeats an unbroken one."""
    rank = distributed.rank()
    torch.manual_seed(config.seed * 1_000_003 + step + (rank << 40))
    # torch's draws would wait for a GPU
    seeds = random.Random(f"{config.seed} {step} {rank}")
    loss = torch.zeros((), device=batch.device)
    autocast = torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with student.lowered(dtype):
        for rows in distributed.shard_strided(batch).split(config.micro_batch_size):
            targets = rows[:, 1:].flatten()
            with autocast:
                hidden = student.hidden(rows[:, :-1], config.dropout, seeds.getrandbits(48))
                nats = ops.cross_entropy(hidden.flatten(0, 1), student.unembedding, targets)
            rows_loss = nats * (len(rows) / len(batch))
            rows_loss.backward()
            loss += rows_loss.detach()
    loss = distributed.all_reduce_sum(loss)
    distributed.all_reduce_gradients(student.parameters())
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    # The optimizer divides by it as it reads the gradient, so clipping takes no extra pass over
    # memory.
    scale = (grad_norm / config.grad_clip).clamp(min=1.0) if config.grad_clip else None
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def validation(run: PretrainingRun) -> dict[str, float]:
    """On all held-out sequences at the end of the run, on some of them before."""
    config = run.config
    sequences = config.eval_sequences if run.state.words < config.words else None
    with run.compute.autocast():
        loss, bits = validate(
            run.student,
            run.data.val,
            run.data.tokenizer.token_sizes,
            sequences,
            config.micro_batch_size,
            config.packing,
        )
    return {"val_loss": loss, "val_bits_per_byte": bits}


def tell_story(run: PretrainingRun) -> None:
    """Print and record the student's continuation of OPENING, from the same random numbers at every
    step. It is not trained on and changes no bit of the training."""
    step = run.state.step
    tokenizer = run.data.tokenizer
    context = run.config.context
    room = context - len(encode_opening(tokenizer, OPENING))
    if room < 1 or not distributed.is_rank0():
        return
    hf.require_finite(step, run.student, {}, TOO_LARGE)
    with run.compute.autocast():
        (story,) = generate(
            run.student,
            None,
            tokenizer,
            [OPENING],
            first_index=0,
            max_new_tokens=min(STORY_TOKENS, context // 2, room),
            seed=run.config.seed,
        )
    record: Record = dict(step=step, index=0, opening=OPENING, story=story.text)
    record |= dict.fromkeys(("reply", "scores", "score", "reward"))
    record |= dict(words=story.words, ended=story.ended)
    run.log.append(EVALUATIONS, [record])
    heading = f"--- step {step:,}"
    if step:
        heading = f"{heading}, validation loss {run.steps.metrics['val_loss']:.3f}"
    run.bar.write(f"{heading}\n{story_text(OPENING, story.text)}\n")


def save(run: PretrainingRun, name: str) -> None:
    if not distributed.is_rank0():  # it would delete, as incomplete, what rank 0 is writing
        return
    state = run.state
    history = {
        "words": state.words,
        "tokens": state.tokens,
        "corpus": run.config.corpus,
        "corpus_words": run.data.train.word_count,
    }
    tensors = checkpoint.pack_optimizer(run.optimizer)
    hf.require_finite(state.step, run.student, tensors, TOO_LARGE)
    folder = run.log.folder / "checkpoints" / name
    checkpoint.save(
        folder,
        run.student,
        run.data.tokenizer,
        history=history,
        state=tensors,
        counters=asdict(state),
    )
    checkpoint.drop_older(folder)


# ---- before and after the loop -------------------------------------------------------------------


def open_run(config: PretrainConfig) -> PretrainingRun:
    """A run, ready for its next step."""
    distributed.require_one_each("--batch-size", config.batch_size)
    folder = Path(config.out)
    rank0 = distributed.is_rank0()
    compute = resolve(config.device, config.dtype)
    memory.require_for_pretraining(config, compute.device)
    resume_from = None
    if config.resume:
        resume_from = distributed.rank0_value(lambda: checkpoint.newest_whole(folder))

    corpus = open_corpus(config.corpus)
    fingerprint = corpus.fingerprint()
    data = distributed.rank0_first(
        lambda: prepare(
            corpus, vocab_size=config.vocab_size, val_fraction=config.val_fraction, seed=config.seed
        )
    )
    step_tokens = config.batch_size * config.context
    if config.preset in babylm.TRACKS:
        babylm.check_pretraining(config.preset, data.train.word_count, config.words, step_tokens)
    windows = open_windows(config, data)
    vocab_size = data.tokenizer.vocab_size
    shape = student_config(config, vocab_size)
    torch.manual_seed(config.seed)
    student = to_device(Student(shape, config.weights_init), compute.device)
    optimizer = make_optimizer(student, config, compute.dtype)
    state = PretrainState(fingerprint)
    if resume_from:
        tensors, state = checkpoint.load_trainer(resume_from, PretrainState)
        if state.corpus != fingerprint:  # before the weights: its vocabulary may have another size
            raise UserError(
                f"the corpus changed since {resume_from} was saved; start a new run with another --out"
            )
        if Tokenizer.load(resume_from / "tokenizer.json").json != data.tokenizer.json:
            raise UserError(
                f"the tokenizer of {resume_from} is not the one that the corpus gives now: its "
                "config.json was edited, or another version of tokenizers trained it; undo that, or "
                "start a new run with another --out"
            )
        checkpoint.restore(student, resume_from)
        with checkpoint.restoring(resume_from):
            checkpoint.unpack_optimizer(optimizer, tensors)

    resume_step = state.step if config.resume else None
    log = distributed.rank0_first(lambda: RunLog(folder, resume_step=resume_step, writes=rank0))
    distributed.broadcast_from_rank0(student.parameters())
    size = sum(p.numel() for p in student.parameters())
    facts = {"parameters": size, "corpus": config.corpus}
    log.config(asdict(config) | compute.recorded | {"student": facts})
    print_documents(data.train, config.context)
    epochs = config.words / data.train.word_count
    print(
        wrapped(
            f"student with {size / 1e6:.1f} M parameters, {vocab_size} tokens, {compute.device}, "
            f"{compute.recorded['dtype']}; {config.words:,} words to train on, "
            f"{epochs:.2f} times the corpus"
        )
    )
    bar = Progress(
        total=config.words,
        initial=min(state.words, config.words),
        unit="words",
        unit_scale=True,
        desc="pretraining: ",
        mininterval=0.5,
        disable=not rank0,
    )
    steps = StepLog(log, bar, step_tokens, CollapseDetector(read_metrics(folder)).add)
    return PretrainingRun(
        config, compute, data, windows, student, optimizer, state, log, bar, steps
    )


def open_windows(config: PretrainConfig, data: Dataset) -> Windows | Curriculum:
    """The sequences of each step: of a curriculum if some of the corpora pause and the others fill a
    sequence."""
    options = config.context, config.batch_size, config.seed, config.packing
    whole = Windows(data.train, *options)
    if config.context < len(data.middle) < len(data.train):
        return Curriculum(whole, Windows(data.middle, *options), config.words)
    return whole


def print_documents(train: TokenFile, context: int) -> None:
    """How many documents the corpus has and how long they are; and what to do if most of the text is
    in documents so long that the student hardly sees a story end."""
    words = train.document_words()
    print(f"corpus: {len(words):,} training documents, median length {np.median(words):,.0f} words")
    tokens = np.diff(train.offsets)
    longest = LONG_DOCUMENT * context
    if tokens[tokens > longest].sum() > len(train) / 2:
        print(
            wrapped(
                f"warning: most of the corpus is in documents of more than {longest:,} tokens, "
                f"{LONG_DOCUMENT} times --context, so the student hardly sees a story end: separate "
                f"the stories of a .txt file by blank lines or {MARKER}, or give a .jsonl file with "
                "one story per line"
            )
        )


def report(run: PretrainingRun) -> None:
    """Print how to resume a run that was asked to stop, or a finished student's validation."""
    config, folder = run.config, run.log.folder
    words = run.state.words
    if words < config.words:
        resume = hint("train_pretrain.py", "--out", folder, "--resume", *given_again(config))
        print(f"stopped after {words:,} words, all saved; go on with: {resume}")
        return
    last = run.steps.metrics  # {} if the run was finished before it was resumed
    if last:
        loss, bits = last["val_loss"], last["val_bits_per_byte"]
        corpus = printable(", ".join(Path(name).name for name in config.corpus))
        print(
            wrapped(
                f"validation loss {loss:.3f} nats per token, {bits:.3f} bits per byte, on the "
                f"held-out {100 * config.val_fraction:g} % of {corpus}"
            )
        )
    print(printable(f"report: {folder / 'report.html'}"))
    print(f"next:   {next_command(config, run.data.tokenizer)}")


def next_command(config: PretrainConfig, tokenizer: Tokenizer) -> str:
    """The command for an interaction with this student, or a sentence on why it has no room for
    one."""
    openings = load_openings(InteractConfig.openings)
    longest = max(len(encode_opening(tokenizer, opening)) for opening in openings)
    room = config.context - longest
    if room < 1:
        return (
            f"a student with a longer --context than {config.context}: the longest built-in opening "
            f"has {longest} tokens, so no story fits; train_interact.py would need a short --opening"
        )
    arguments = ["--init", str(checkpoint.newest(Path(config.out)))]
    arguments += given_again(config)  # --corpus, if it holds files: the built-in teacher needs them
    if room < InteractConfig.max_new_tokens:
        arguments += ["--max-new-tokens", str(room)]
    return hint("train_interact.py", *arguments)


if __name__ == "__main__":
    main()
