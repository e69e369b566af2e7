"""What the terminal shows when a run ends: how to resume it, or its result and what comes
next."""

from pathlib import Path

from tinystory.config import InteractConfig, PretrainConfig, RunConfig
from tinystory.config.record import given_again
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.control import read_comparisons
from tinystory.human.progress import read_progress
from tinystory.report.before_after import summary
from tinystory.report.commands import next_command
from tinystory.report.control import answer, interval_note, sentence, table, title
from tinystory.report.page import count
from tinystory.report.run import scorer, write_report
from tinystory.run.folder import read_config
from tinystory.run.paths import hint
from tinystory.run.records import Record
from tinystory.run.terminal import aligned, wrapped
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.teacher.endpoint import HUMAN


def print_stopped(config: RunConfig, command: str, after: str) -> None:
    """How to resume a run that was asked to stop. after: a step or a number of words."""
    resume = hint(command, "--out", Path(config.out), "--resume", *given_again(config))
    print(f"stopped after {after}, everything is saved. Resume with: {resume}")


def print_interaction(config: InteractConfig) -> None:
    """What a finished interaction changed, and what comes next."""
    folder = Path(config.out)
    print(summary(folder))
    print(answer(folder))
    print(printable(f"report: {folder / 'report.html'}"))
    label = "next: "
    if scorer(read_config(folder)) == HUMAN and (pairs := read_progress(folder).pairs):
        url = config.teacher_url[0].rstrip("/").removesuffix("/v1")
        print(printable(f"next:   compare {count(len(pairs), 'pair')} of stories at {url}"))
        label = "then: "
    print(f"{label}  {hint('scripts/sample.py', checkpoint.find(folder))}")


def print_control(config: InteractConfig) -> None:
    """What a finished control says about its run, whose report is written again."""
    run = Path(config.control[0])
    for comparison in read_comparisons(run):
        if comparison.name == config.control[1]:
            header, rows = table(comparison)
            print("\n".join([title(comparison), *aligned([header, *rows])]))
            print(wrapped(f"{sentence(comparison)}\n{interval_note(comparison)}"))
            if not comparison.has_verdicts:
                # with the same teacher, so that the controls are graded alike
                print(f"another control: {hint('train_interact.py', *given_again(config))}")
    print(printable(f"report: {write_report(run)}"))


def print_pretraining(config: PretrainConfig, metrics: Record, tokenizer: Tokenizer) -> None:
    """A finished student's validation. metrics: of the last step, {} if the run was finished before
    it was resumed."""
    if metrics:
        loss, bits = metrics["val_loss"], metrics["val_bits_per_byte"]
        corpus = printable(", ".join(Path(name).name for name in config.corpus))
        print(
            wrapped(
                f"validation loss {loss:.3f} nats per token, {bits:.3f} bits per byte, on the "
                f"held-out {100 * config.val_fraction:g} % of {corpus}"
            )
        )
    print(printable(f"report: {Path(config.out) / 'report.html'}"))
    print(f"next:   {next_command(config, tokenizer)}")
