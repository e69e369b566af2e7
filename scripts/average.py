"""Average the weights of interactions of one student.

    python train_interact.py --init runs/pretrain --temperature 0.5 --seed 1 --out runs/a
    python train_interact.py --init runs/pretrain --temperature 0.5 --seed 2 --out runs/b
    python scripts/average.py runs/a runs/b runs/mean
    python scripts/sample.py runs/mean

The mean keeps what the changes of the runs have in common, and shrinks the rest, such as the noise
of each run's own stories (model soups, Wortsman et al. 2022, arXiv 2203.05482). The runs can be
trained at the same time. They must have started from the same student at the same
temperature.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory.run.errors import UserError, command
from tinystory.run.folder import require_output
from tinystory.run.options import script_parser
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.student.model import Student

SPENT = ("interaction_words_in", "interaction_words_out")  # numbers of words in a history


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "run",
        type=Path,
        nargs="+",
        help="folders of two runs or more (of each, the checkpoint `best`, or else the newest), or "
        "of checkpoints of different runs",
    )
    add("folder", type=Path, help="new folder for the checkpoint")
    options = parser.parse_args(argv)
    if len(options.run) < 2:
        raise UserError("give two runs or more, and then a new folder for their mean")
    require_output(options.folder)

    folders = [checkpoint.find(run).resolve() for run in options.run]
    if len({folder.parent for folder in folders}) < len(folders):
        raise UserError("two of these checkpoints are of one run: give different runs")
    start, tokenizer, start_history = checkpoint.load(start_of(folders[0]))
    students = []
    histories = []
    for folder in folders:
        require_same_start(folder, start)
        student, _, history = checkpoint.load(folder)
        students.append(student)
        histories.append(history)
    load_mean(start, students)
    checkpoint.save(
        options.folder,
        start,
        tokenizer,
        history=summed(start_history, histories),
        state={},
        counters={"step": 0},
    )
    for folder in folders:
        print(printable(f"averaged: {folder} (step {checkpoint.read_counters(folder)['step']})"))
    print(printable(f"written: {options.folder}"))


def start_of(folder: Path) -> Path:
    """The checkpoint from which the interaction of a checkpoint started. Raises UserError if there
    is none."""
    start = folder.parent / "start"
    if not start.is_dir():
        raise UserError(
            f"{folder} is not of a run of train_interact.py: give the folders of such runs"
        )
    return start


def require_same_start(folder: Path, start: Student) -> None:
    """Raises UserError unless the checkpoint's run started from this student."""
    student, _, _ = checkpoint.load(start_of(folder))
    same = student.config == start.config
    if same:
        weights = student.state_dict()
        same = all(tensor.equal(weights[name]) for name, tensor in start.state_dict().items())
    if not same:
        raise UserError(
            f"{folder} started from another student than the first run, or at another temperature: "
            "give all runs the same --init and the same --temperature, which is not 0"
        )


@torch.no_grad()
def load_mean(student: Student, students: list[Student]) -> None:
    """Load the mean of the students' weights, computed in float64, into `student`."""
    for name, tensor in student.state_dict().items():
        weights = [other.state_dict()[name].double() for other in students]
        tensor.copy_(torch.stack(weights).mean(0))


def summed(start: dict[str, Any], histories: list[dict[str, Any]]) -> dict[str, Any]:
    """The history of the mean: that of its start, with the words of all interactions."""
    total = dict(start)
    for name in SPENT:
        before = start.get(name, 0)
        total[name] = before + sum(history.get(name, before) - before for history in histories)
    return total


if __name__ == "__main__":
    main()
