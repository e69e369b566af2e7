"""Pretrain a student on a corpus, with checkpoints along the way."""

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from tinystory import ops
from tinystory.config import PretrainConfig
from tinystory.config.command_line import parse
from tinystory.data import babylm
from tinystory.data.corpus import open_corpus
from tinystory.data.shards import Dataset, prepare, print_documents
from tinystory.data.windows import Curriculum, Windows, open_windows
from tinystory.evaluate.validation import story_record, story_to_opening, validate
from tinystory.ops.compute import Compute, resolve
from tinystory.report.ending import print_pretraining, print_stopped
from tinystory.report.run import live_report
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import Download, peak_memory_mb, upload
from tinystory.run.errors import Stop, command
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, read_metrics
from tinystory.run.step_log import ProgressBar, StepLog
from tinystory.run.terminal import story_text, wrapped
from tinystory.student import checkpoint, hf, memory, pretraining
from tinystory.student.model import Student, student_config, to_device
from tinystory.student.optim import clip_gradients, make_optimizer, set_learning_rate
from tinystory.student.pretraining import TOO_LARGE, PretrainState


@command
def main(argv: list[str] | None = None) -> None:
    config: PretrainConfig = parse(PretrainConfig, argv)
    distributed.start(config.device)
    with distributed.run_folder(config) as config:
        run = open_run(config)
        pretrain(run)
        finish(run)
    distributed.end_if_stopped(run.stop)


@dataclass
class PretrainingRun:
    """An open run: student, optimizer and state, the tokenized corpus, and the log. windows: the
    sequences of each step. steps: metrics of steps that a GPU may still be computing."""

    config: PretrainConfig
    compute: Compute
    data: Dataset
    windows: Windows | Curriculum
    student: Student
    optimizer: Optimizer
    state: PretrainState
    log: RunLog
    stop: Stop
    bar: ProgressBar
    steps: StepLog


def pretrain(run: PretrainingRun) -> None:
    """Run steps until the student has read --words words, or until a signal."""
    config, state, steps = run.config, run.state, run.steps
    device = run.compute.device
    folder = run.log.folder
    next_batch = load_batch(run, state.step)
    writes = distributed.is_rank0()
    with run.log, run.stop.listening(), live_report(folder, writes) as update_report, run.bar:
        if state.step == 0:
            tell_story(run)
        while state.words < config.words and not distributed.stop_signal(run.stop):
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
            names = babylm.milestones_between(words_before, state.words)
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
    """The sequences of a step, (B, T + 1) int64 on the device, and the number of words in them."""
    tokens, words = run.windows.batch(number)
    return upload(tokens, run.compute.device), words


def steps_ahead(device: torch.device) -> int:
    """Number of steps to launch before waiting for the loss of an earlier one, so that a GPU always
    has work."""
    return 1 if device.type == "cuda" else 0


def train_step(
    student: Student,
    optimizer: Optimizer,
    batch: Tensor,
    config: PretrainConfig,
    dtype: torch.dtype,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Mean loss (nats per token, over all processes) and gradient norm of one update on a batch.

    batch: (B, T + 1) int64, sharded over processes. dtype: for the matmuls. Randomness is a
    function of (seed, step), so a resumed run repeats an uninterrupted one. The gradient of each
    row is scaled by 1 / B in every micro-batch and process; then the summed gradient is clipped."""
    rank = distributed.rank()
    torch.manual_seed(config.seed * 1_000_003 + step + (rank << 40))
    # drawn by Python: a draw by PyTorch would wait for the GPU
    seeds = random.Random(f"{config.seed} {step} {rank}")
    loss = torch.zeros((), device=batch.device)
    autocast = torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with student.lowered(dtype):
        for rows in distributed.shard_strided(batch).split(config.micro_batch_size):
            targets = rows[:, 1:].flatten()
            with autocast:
                hidden = student.hidden(rows[:, :-1], config.dropout, seeds.getrandbits(48))
                nats = ops.cross_entropy(hidden.flatten(0, 1), student.unembedding, targets)
            rows_loss = nats * (len(rows) / len(batch))  # the sum over micro-batches is the mean
            rows_loss.backward()
            loss += rows_loss.detach()
    loss = distributed.all_reduce_sum(loss)
    distributed.all_reduce_gradients(student.parameters())
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if config.grad_clip:
        clip_gradients(optimizer, grad_norm, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def validation(run: PretrainingRun) -> dict[str, float]:
    """Validation loss and bits per byte: on all held-out sequences at the end of the run, on
    --eval-sequences of them before."""
    config, data = run.config, run.data
    sequences = config.eval_sequences if run.state.words < config.words else None
    sizes = data.tokenizer.token_sizes
    with run.compute.autocast():
        loss, bits = validate(
            run.student, data.val, sizes, sequences, config.micro_batch_size, config.packing
        )
    return {"val_loss": loss, "val_bits_per_byte": bits}


def tell_story(run: PretrainingRun) -> None:
    """Print and record a story by the student to a fixed opening. The story is not used for
    training, and sampling it changes no bit of the training."""
    if not distributed.is_rank0():
        return
    step = run.state.step
    hf.require_finite(step, run.student, {}, TOO_LARGE)
    with run.compute.autocast():
        story = story_to_opening(run.student, run.data.tokenizer, run.config.seed)
    if story is None:
        return
    run.log.append(EVALUATIONS, [story_record(step, story)])
    heading = f"--- step {step:,}"
    if step:
        heading = f"{heading}, validation loss {run.steps.metrics['val_loss']:.3f}"
    run.bar.write(f"{heading}\n{story_text(story.opening, story.text)}\n")


def save(run: PretrainingRun, name: str) -> None:
    # another rank would take rank 0's unfinished checkpoint for an incomplete one and delete it
    if not distributed.is_rank0():
        return
    folder = run.log.folder / "checkpoints" / name
    history = {
        "preset": run.config.preset,
        "corpus": run.config.corpus,
        "corpus_words": run.data.train.word_count,
        "val_fraction": run.config.val_fraction,  # with the seed, the documents held out
        "seed": run.config.seed,
    }
    pretraining.save(folder, run.student, run.data.tokenizer, run.optimizer, run.state, history)


# ---- before and after the loop -------------------------------------------------------------------


def open_run(config: PretrainConfig) -> PretrainingRun:
    """A run that is ready for the next step. The order: the tokenized corpus; student and
    optimizer; their saved state if the run is resumed; the run's folder, last, so that no error
    that the user can fix leaves files behind."""
    distributed.require_one_each("--batch-size", config.batch_size)
    folder = Path(config.out)
    compute = resolve(config.device, config.dtype)
    memory.require_for_pretraining(config, compute.device)
    newest = None
    if config.resume:
        newest = distributed.rank0_value(lambda: checkpoint.newest_whole(folder))

    corpus = open_corpus(config.corpus)
    state = PretrainState(corpus.fingerprint())
    vocab_size, val_fraction, seed = config.vocab_size, config.val_fraction, config.seed
    data = distributed.rank0_first(
        lambda: prepare(corpus, vocab_size=vocab_size, val_fraction=val_fraction, seed=seed)
    )
    corpus_words = data.train.word_count
    step_tokens = config.batch_size * config.context
    if config.preset in babylm.TRACKS:
        babylm.check_pretraining(config.preset, corpus_words, config.words, step_tokens)
    windows = open_windows(
        data, config.context, config.batch_size, seed, config.packing, config.words
    )

    torch.manual_seed(seed)
    shape = student_config(config, data.tokenizer.vocab_size)
    student = to_device(Student(shape, config.weights_init), compute.device)
    optimizer = make_optimizer(student, config, compute.dtype)
    if newest:
        state = pretraining.restore(newest, student, data.tokenizer, optimizer, state.corpus)
    distributed.broadcast_from_rank0(student.parameters())

    log = distributed.open_log(folder, state.step if config.resume else None)
    size = sum(p.numel() for p in student.parameters())
    facts = {"parameters": size, "corpus": config.corpus}
    log.config(asdict(config) | compute.recorded | {"student": facts})
    print_documents(data.train, config.context)
    print(
        wrapped(
            f"student with {size / 1e6:.1f} M parameters, {shape.vocab_size} tokens, "
            f"{compute.device}, {compute.recorded['dtype']}; {config.words:,} words to train on, "
            f"{config.words / corpus_words:.2f} times the corpus"
        )
    )
    warning = pretraining.too_many_passes(config.words, corpus_words)
    if warning:
        print(wrapped(warning))
    bar = ProgressBar(
        total=config.words,
        initial=min(state.words, config.words),
        unit="words",
        unit_scale=True,
        desc="pretraining: ",
        mininterval=0.5,
    )
    steps = StepLog(log, bar, step_tokens, CollapseDetector(read_metrics(folder)).add)
    return PretrainingRun(
        config, compute, data, windows, student, optimizer, state, log, Stop(), bar, steps
    )


def finish(run: PretrainingRun) -> None:
    """Print how to resume a stopped run, or the validation results of a finished run."""
    if not distributed.is_rank0():
        return
    if run.state.words < run.config.words:
        print_stopped(run.config, "train_pretrain.py", f"{run.state.words:,} words")
    else:
        print_pretraining(run.config, run.steps.metrics, run.data.tokenizer)


if __name__ == "__main__":
    main()
