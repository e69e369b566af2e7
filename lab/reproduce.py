"""The paper's experiment as one command: does interaction replace pretraining on many times as many
words?

python lab/reproduce.py --scale tiny             the demo's corpus, teacher and recipe, fewer stories
python lab/reproduce.py --scale small --pretrain "--corpus stories.txt" --out runs/small
python lab/reproduce.py --scale paper --teacher "--teacher-url http://127.0.0.1:8000/v1"

One student is pretrained, with a checkpoint at every milestone of words. From some of these it
continues in three ways:

interact  it writes stories and the teacher scores them, for several seeds
random    the same with a control, here a random score (--controls: values of --reward)
more      pretraining on as many further words as interaction took in and wrote, the learning rate
          decaying to 0

Every checkpoint then writes stories with the same random numbers, the teacher grades them, and
OUT/report.html compares them. The reward of `small` and `paper` is the paper's, for a single
opening, unless --interact has other options. Each run of a train command has its own folder. After
Ctrl-C or a kill, the same command resumes interrupted runs and skips finished ones.
"""

import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
from tqdm import tqdm

from lab import figures, recipes
from lab.pairs import evaluate_pairs, task_items
from lab.runs import folder_of, interact_config, pretrain_config, train, words_of
from tinystory.config import (
    PAPER_OPENING,
    InteractConfig,
    PretrainConfig,
)
from tinystory.data.babylm import MILESTONES, milestone_name
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.evaluate.held_out import has_dull_tellers
from tinystory.evaluate.stories import mean_of
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import pick_device
from tinystory.report import charts, page
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import add_number, script_parser
from tinystory.run.records import CONFIG, NO_FIELDS, Fields, Record, plain, read_object
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

MILLION = 10**6
VAL_SEQUENCES = 256  # held-out sequences for bits per byte
# columns for any corpus
OF_STORIES = ("reward", "score", "ended", "words", "distinct_4", "clusters")
BEFORE, INTERACT, MORE = "before", "interact", "more"  # arms; a control's is its value of --reward
COLOURS = ("plain", "reward", "readability", "coherence", "creativity", "muted")  # by arm


class Scale(NamedTuple):
    """pretrain, interact: options of the train commands; starts: millions of pretraining words
    before interaction; seeds: per arm and start; stories: graded per checkpoint; controls: values
    of --reward."""

    pretrain: str
    interact: str
    starts: Sequence[int]
    seeds: int
    stories: int
    controls: Sequence[str]


class Student(NamedTuple):
    """A checkpoint to evaluate, the last of its run (the best would be selected by its score). start:
    words of pretraining before its arm; words: of pretraining and taken in."""

    arm: str
    start: int
    seed: int
    words: int
    folder: Path


EVALUATION: Fields = {  # of a student, in a file of OUT/evaluation
    "arm": (str,),
    "start": (int,),
    "seed": (int,),
    "words": (int,),
    "measures": (dict,),
}


@dataclass(frozen=True)
class Plan:
    """What the command line asks for, checked. settings: what must be the same when it is run
    again; arms: options that name the scorer, by arm; starts: words of pretraining; seeds: their
    number."""

    out: Path
    settings: Record
    pretrain: PretrainConfig
    pretrain_argv: Sequence[str]
    interact: InteractConfig
    interact_argv: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    starts: Sequence[int]
    seeds: int
    on_device: Sequence[str]


# `small`, the settings of lab/results.md whatever the demo's are, learned most in minutes on a CPU
# (lab/LOG.md): one epoch over more stories, a weak KL penalty, and the paper's reward.
SCALES = {
    "tiny": Scale(
        "--words 3M",
        "--stories-per-step 512 --minibatch-size 64 --eval-every 0",
        (1, 2, 3),
        2,
        200,
        ("likelihood", "constant"),
    ),
    "small": Scale(
        "--weights-init gpt2 --optimizer adamw --packing stream --learning-rate 1.5e-3 --warmup 0.05 --corpus "
        "tinystories --words 10M --n-layer 4 --n-head 4 --n-embd 256 --vocab-size 8192 --batch-size 16",
        "--stories-per-step 64 --steps 60 --learning-rate 1e-4 --no-lr-decay --sharpness-rate 0 --learner gae "
        "--value-coef 1 --kl-coef 0.02 --kl-target 12 --kl-horizon 10000 --eval-every 0 --max-new-tokens 90 "
        f"--diversity 0 --unfinished 1 --openings {shlex.quote(PAPER_OPENING)}",
        (1, 2, 5, 10),
        3,
        256,
        ("random",),
    ),
    "paper": Scale(
        "--preset paper", "--preset paper", (20, 50, 90, 200, 500, 900), 1, 512, ("random",)
    ),
}


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny")
    add("--out", help="folder of the experiment (default: runs/reproduce-SCALE)")
    add(
        "--pretrain",
        default="",
        metavar="TEXT",
        help="options of train_pretrain.py, over those of the scale",
    )
    add(
        "--interact",
        default="",
        metavar="TEXT",
        help="options of train_interact.py, over those of the scale",
    )
    add(
        "--teacher",
        default="",
        metavar="TEXT",
        help="further ones, that name the teacher (default: built in)",
    )
    add(
        "--controls",
        nargs="*",
        metavar="REWARD",
        help="interactions for these (default: as --scale has it)",
    )
    add(
        "--milestones",
        nargs="+",
        type=int,
        metavar="M",
        help="starts of interaction, million words",
    )
    add_number(
        parser,
        "--seeds",
        0,
        "[0, 1000]",
        "interactions per milestone and arm; 0: as --scale has it",
    )
    add_number(parser, "--stories", 0, "[0, 1e6]", "stories of an evaluation; 0: as --scale has it")
    add("--blimp", default="", help="folder of BLiMP's .jsonl files, evaluated too")
    add("--device", default="auto")
    options = parser.parse_args(argv)
    scale = SCALES[options.scale]
    default = f"runs/reproduce-{options.scale}"
    out = folder_of(default if options.out is None else options.out)
    settings: Record = {
        "pretrain": f"{scale.pretrain} {options.pretrain}".strip(),
        "interact": f"{scale.interact} {options.interact}".strip(),
        "stories": options.stories or scale.stories,
        "blimp": options.blimp,
    }
    controls = scale.controls if options.controls is None else options.controls
    arms = {INTERACT: words_of("--teacher", options.teacher)} | {
        control: ["--reward", control] for control in controls
    }
    on_device = ["--device", options.device]
    pretrain_argv = words_of("--pretrain", settings["pretrain"])
    interact_argv = words_of("--interact", settings["interact"])
    pretrain = pretrain_config([*pretrain_argv, *on_device])
    configs = [interact_config([*interact_argv, *scorer]) for scorer in arms.values()]
    starts = [start * MILLION for start in options.milestones or scale.starts]
    if missing := [start for start in starts if start not in MILESTONES or start > pretrain.words]:
        raise UserError(
            f"pretraining on {pretrain.words:,} words leaves no checkpoint at {missing[0] // MILLION} M: choose "
            "--milestones that it reaches, among 1 to 9, 10 to 90 by 10, 100 to 1000 by 100"
        )
    if options.blimp and not task_items(options.blimp, wug=False):
        raise UserError(f"--blimp {options.blimp} holds no .jsonl or .jsonl.gz file")
    plan = Plan(
        out=out,
        settings=settings,
        pretrain=pretrain,
        pretrain_argv=pretrain_argv,
        interact=replace(configs[0], device=options.device),
        interact_argv=interact_argv,
        arms=arms,
        starts=starts,
        seeds=options.seeds or scale.seeds,
        on_device=on_device,
    )
    with locked(out):
        require_same(out / "experiment.json", settings)
        students = train_students(plan)
        scored_by, records = evaluate(plan, students)
        report = write_page(out, settings | {"scored by": scored_by}, [*arms], records)
    print(f"report: {report}")


def require_same(path: Path, settings: Record) -> None:
    """Write the settings that all runs of an experiment share. Raises UserError if the file has
    others, or cannot be read."""
    before = read_own(path) if path.exists() else settings
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        old, new = before.get(changed[0]), settings[changed[0]]
        raise UserError(
            f"{path.parent} was begun with {changed[0]} {old!r}, not {new!r}: choose another --out"
        )
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


def read_own(path: Path, fields: Fields = NO_FIELDS) -> Record:
    try:
        return read_object(path, fields)
    except UserError as error:
        raise UserError(f"{error}; restore it from a copy, or choose another --out") from None


def train_students(plan: Plan) -> list[Student]:
    """Run what is not finished yet, and return all checkpoints to evaluate."""
    out, on_device = plan.out, plan.on_device
    train(out / "pretrain", plan.pretrain_argv, on_device, plan.pretrain.words)
    milestones = {
        words: out / "pretrain" / "checkpoints" / milestone_name(words) for words in MILESTONES
    }
    students = [
        Student(BEFORE, words, 0, words, path)
        for words, path in milestones.items()
        if path.exists()
    ]
    for arm, scorer in plan.arms.items():
        for seed, start in itertools.product(range(plan.seeds), plan.starts):
            folder = out / arm.replace("/", "_") / f"{start // MILLION}M-{seed}"
            init = ["--init", str(milestones[start]), "--seed", str(seed)]
            last = train(folder, [*plan.interact_argv, *init], [*scorer, *on_device])
            spent = checkpoint.read_counters(last)
            students.append(Student(arm, start, seed, start + spent["words_in"], last))
            if (arm, seed) == (INTERACT, 0):
                more = out / MORE / folder.name
                words = start + spent["words_in"] + spent["words_out"]
                copy_milestone(milestones[start], more)
                last = train(more, (), ["--words", str(words), *on_device], words)
                students.append(Student(MORE, start, 0, words, last))
    return students


def evaluate(plan: Plan, students: Sequence[Student]) -> tuple[str, list[Record]]:
    """The grader's name, and a record per student, kept in OUT/evaluation. Raises UserError if a
    kept one cannot be read."""
    records = []
    replies = plan.out / "replies.jsonl"
    with open_grader(
        plan.interact, builtin_teacher, corpus=plan.pretrain.corpus, replies=replies
    ) as grader:
        for student in tqdm(students, desc="evaluation", unit="checkpoint"):
            parts = student.folder.relative_to(plan.out).parts
            path = plan.out / "evaluation" / f"{'-'.join(parts)}.json"
            if not path.exists():
                measures = measure(
                    student.folder, grader, plan.pretrain, plan.interact, plan.settings
                )
                record = student._asdict() | {"measures": plain(measures)}
                del record["folder"]
                path.parent.mkdir(exist_ok=True)
                atomic_write(path, json.dumps(record, indent=1) + "\n")
            records.append(read_own(path, EVALUATION))
        return str(grader.facts["scored_by"]), records


def copy_milestone(milestone: Path, run: Path) -> None:
    if not (run / CONFIG).exists():
        shutil.rmtree(run, ignore_errors=True)  # a partial copy
        shutil.copytree(milestone, run / "checkpoints" / milestone.name)
        atomic_write(run / CONFIG, (milestone.parents[1] / CONFIG).read_bytes())


def measure(
    folder: Path, grader: Grader, pretrain: PretrainConfig, config: InteractConfig, settings: Record
) -> Record:
    """The page's columns for a checkpoint; random numbers, teacher and texts are the same for
    all."""
    openings = itertools.cycle(Openings(load_openings(config.openings), 0).held_out)
    written = [*itertools.islice(openings, settings["stories"])]
    columns = recipes.measure(recipes.Row("", folder, config.temperature), grader, config, written)
    student, tokenizer, history = checkpoint.load(folder, pick_device(pretrain.device))
    if not has_dull_tellers(history):  # nor was it trained for the grammar's text
        corpus, sizes = (
            open_corpus(pretrain.corpus, pretrain.documents),
            (pretrain.vocab_size, pretrain.val_fraction),
        )
        val = prepare(corpus, vocab_size=sizes[0], val_fraction=sizes[1], seed=pretrain.seed).val
        columns = {name: columns[name] for name in OF_STORIES}
        columns["bits_per_byte"] = validate(
            student, val, tokenizer.token_sizes, VAL_SEQUENCES, 16, "stream"
        )[1]
    if settings["blimp"]:
        columns["BLiMP"] = evaluate_pairs(student, tokenizer, settings["blimp"])["accuracy"]
    return columns


def write_page(
    out: Path, settings: Record, scorers: Sequence[str], records: Sequence[Record]
) -> Path:
    """Write OUT/report.html and OUT/figure.svg, and return the report's path. scorers: the arms of
    interaction."""
    columns = [
        *dict.fromkeys(
            name for record in records for name in record["measures"] if name != "rewards"
        )
    ]
    names = {BEFORE: "pretrained", INTERACT: "+ interaction", MORE: "+ more pretraining"}
    lines, rows = [], list[tuple[int, list[str]]]()
    for arm, colour in zip((BEFORE, INTERACT, MORE, *scorers[1:]), COLOURS, strict=False):
        name, own = (
            names.get(arm, f"+ --reward {arm}"),
            [record for record in records if record["arm"] == arm],
        )
        points = []
        for start in sorted({record["start"] for record in own}):
            group = [record for record in own if record["start"] == start]
            points.append(
                (fmean(record["words"] for record in group), *mean_and_error(group, "score"))
            )
            cells = [f"{start / MILLION:.3g} M {name}", str(len(group))]
            for mean, error in (mean_and_error(group, column) for column in columns):
                cells.append(
                    charts.number(mean)
                    + (f" ± {charts.number(error)}" if error is not None else "")
                )
            rows.append((start, cells))
        words, means, errors = zip(*points, strict=True)
        lines.append(charts.Line(words, means, colour, name, errors))
    figure = charts.chart(
        "Teacher’s score, 0 to 9",
        lines,
        x_name="words of pretraining and taken in",
        size=(640, 380),
    )
    atomic_write(out / "figure.svg", figures.standalone(figure))
    note = (
        "Mean and standard error over the seeds of interaction. Only the reward was learned from. Story, routine, list "
        "...: the fraction that each kind of teller tells; distinct_4 and clusters: over 64 stories; bits_per_byte, "
        "repeated_name and he_or_she: on unseen text, the latter two the probability of the right one."
    )
    table = page.table(
        ["Student", "Seeds", *columns], [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    )
    sections = [
        f'<div style="max-width: 44rem">{figure}</div>',
        page.section("What was rewarded and what was not", note, table),
        page.details("How it was run", "", page.facts(settings.items())),
    ]
    subtitle = escape(f"scored by {settings['scored by']}")
    return page.write(
        out / "report.html", "Does interaction replace pretraining?", subtitle, sections
    )


def mean_and_error(records: Sequence[Record], column: str) -> tuple[float | None, float | None]:
    """Mean (None without values) and standard error (None for a single value) of a column."""
    values = [value for record in records if (value := record["measures"].get(column)) is not None]
    return mean_of(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


if __name__ == "__main__":
    main()
