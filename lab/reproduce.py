"""The paper's experiment as one command: can interaction replace pretraining on many times as many
words?

python lab/reproduce.py --scale tiny             the demo's corpus, teacher and recipe
python lab/reproduce.py --scale small --pretrain "--corpus stories.txt" --out runs/small
python lab/reproduce.py --scale paper --teacher "--teacher-url http://127.0.0.1:8000/v1"

One student is pretrained, with a checkpoint at every milestone of words. From some milestones it
continues in three ways:

interact  interaction with the teacher, for several seeds
random    interaction with a control, here a random score (--controls: values of --reward)
more      pretraining on as many further words as interaction took in and wrote, with the learning
          rate decaying to 0

Every checkpoint then writes stories with the same random numbers, the teacher grades the stories,
and OUT/report.html compares the checkpoints. `small` and `paper` have the paper's reward and a
single opening, unless --interact has other options. Each run of a train command has a separate
folder. After Ctrl-C or a kill, the same command resumes interrupted runs and skips finished ones.
"""

import argparse
import itertools
import json
import math
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
from tqdm import tqdm

from lab import recipes
from lab.figures import COLOURS
from lab.pairs import evaluate_pairs, task_items
from lab.runs import (
    EXPERIMENT,
    corpus_of_teacher,
    folder_of,
    interact_config,
    pretrain_config,
    require_same,
    train,
    without_urls,
    words_of,
)
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.presets import PAPER_OPENING
from tinystory.data.babylm import MILESTONES, milestone_name
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.evaluate.intervals import mean_of
from tinystory.evaluate.open_grader import open_grader
from tinystory.evaluate.story_records import learned_dull_text
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import pick_device
from tinystory.report import charts, page
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import add_number, script_parser
from tinystory.run.records import CONFIG, Record, plain, read_object
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grader

MILLION = 10**6
VAL_SEQUENCES = 256  # held-out sequences for bits per byte
# columns of the table for any corpus
OF_STORIES = ("reward", "score", "ended", "words", "distinct_4", "clusters")
BEFORE, INTERACT, MORE = "before", "interact", "more"  # arms; a control's name is its --reward


@dataclass(frozen=True)
class Scale:
    """Defaults of a --scale. pretrain, interact: options of the train commands; starts: millions of
    pretraining words before interaction; seeds: number of seeds per arm and start; stories: number
    of graded stories per checkpoint; controls: values of --reward."""

    pretrain: str
    interact: str
    starts: Sequence[int]
    seeds: int
    stories: int
    controls: Sequence[str]


@dataclass(frozen=True)
class Student:
    """A checkpoint to evaluate: the last of its run, because `best` would be selected by its score.
    start: words of pretraining before the arm; words: words of pretraining, plus words taken in."""

    arm: str
    start: int
    seed: int
    words: int
    folder: Path


@dataclass(frozen=True)
class Plan:
    """The checked settings of an experiment. settings: values that must be the same when the
    command runs again; arms: options that name the scorer, by arm; starts: words of pretraining
    before interaction; seeds: number of seeds."""

    out: Path
    settings: Record
    pretrain: PretrainConfig
    pretrain_argv: list[str]
    interact: InteractConfig
    interact_argv: list[str]
    arms: dict[str, list[str]]
    starts: Sequence[int]
    seeds: int
    on_device: list[str]


# `small` has the settings of lab/results/pretraining.md, independent of the demo's. They learned most in
# minutes on a CPU (lab/LOG.md): one epoch over more stories, a weak KL penalty, and the paper's
# reward.
SCALES = {
    "tiny": Scale(
        pretrain="--words 3M",
        interact="--stories-per-step 512 --minibatch-size 64 --eval-every 0",
        starts=(1, 2, 3),
        seeds=2,
        stories=200,
        controls=("likelihood", "constant"),
    ),
    "small": Scale(
        pretrain="--weights-init gpt2 --optimizer adamw --packing stream --learning-rate 1.5e-3 --warmup 0.05 "
        "--corpus tinystories --words 10M --n-layer 4 --n-head 4 --n-embd 256 --vocab-size 8192 --batch-size 16",
        interact="--stories-per-step 64 --steps 60 --learning-rate 1e-4 --no-lr-decay --logit-scale-lr 0 "
        "--temperature 1 --lam 1 --learner gae --value-coef 1 --kl-coef 0.02 --kl-target 12 --kl-horizon 10000 "
        f"--eval-every 0 --max-new-tokens 90 --diversity 0 --unfinished 1 --openings {shlex.quote(PAPER_OPENING)}",
        starts=(1, 2, 5, 10),
        seeds=3,
        stories=256,
        controls=("random",),
    ),
    "paper": Scale(
        pretrain="--preset paper",
        interact="--preset paper",
        starts=(20, 50, 90, 200, 500, 900),
        seeds=1,
        stories=512,
        controls=("random",),
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
        help="options of train_pretrain.py, which override those of the scale",
    )
    add(
        "--interact",
        default="",
        metavar="TEXT",
        help="options of train_interact.py, which override those of the scale",
    )
    add(
        "--teacher",
        default="",
        metavar="TEXT",
        help="options of train_interact.py that name the teacher (default: the built-in teacher)",
    )
    add(
        "--controls",
        nargs="*",
        metavar="REWARD",
        help="values of --reward for control interactions (default: those of the scale)",
    )
    add(
        "--milestones",
        nargs="+",
        type=int,
        metavar="M",
        help="milestones from which interaction starts, in million words",
    )
    add_number(
        parser,
        "--seeds",
        0,
        "[0, 1000]",
        "number of interactions per milestone and arm; 0: that of the scale",
    )
    add_number(
        parser,
        "--stories",
        0,
        "[0, 1e6]",
        "number of stories of an evaluation; 0: that of the scale",
    )
    add("--blimp", default="", help="folder of BLiMP's .jsonl files, to evaluate BLiMP too")
    add("--device", default="auto")
    plan = make_plan(parser.parse_args(argv))
    with locked(plan.out):
        require_same(plan.out / EXPERIMENT, plan.settings)
        students = train_students(plan)
        scored_by, records = evaluate(plan, students)
        settings = plan.settings | {"scored by": scored_by}
        report = write_page(plan.out, settings, list(plan.arms), records)
    print(f"report: {report}")


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan of an experiment with these options. Raises UserError for options that its runs
    would refuse."""
    scale = SCALES[options.scale]
    default = f"runs/reproduce-{options.scale}"
    out = folder_of(default if options.out is None else options.out)
    settings: Record = {
        "pretrain": f"{scale.pretrain} {options.pretrain}".strip(),
        "interact": f"{scale.interact} {options.interact}".strip(),
        "stories": options.stories or scale.stories,
        "blimp": options.blimp,
        "teacher": without_urls(options.teacher),
    }
    arms = {INTERACT: words_of("--teacher", options.teacher)}
    for control in scale.controls if options.controls is None else options.controls:
        arms[control] = ["--reward", control]
    on_device = ["--device", options.device]
    pretrain_argv = words_of("--pretrain", settings["pretrain"])
    interact_argv = words_of("--interact", settings["interact"])
    pretrain = pretrain_config(pretrain_argv + on_device)
    for scorer in arms.values():
        interact_config(interact_argv + scorer)
    if interact_config(interact_argv).temperature == 0:
        raise UserError("--interact needs a --temperature above 0, for students before interaction")
    starts = [start * MILLION for start in options.milestones or scale.starts]
    for start in starts:
        if start not in MILESTONES or start > pretrain.words:
            raise UserError(
                f"pretraining on {pretrain.words:,} words leaves no checkpoint at {start // MILLION} M: choose smaller "
                "--milestones, among 1 to 9, 10 to 90 by 10, 100 to 1000 by 100"
            )
    if options.blimp and not task_items(options.blimp, wug=False):
        raise UserError(f"--blimp {options.blimp} holds no .jsonl or .jsonl.gz file")
    return Plan(
        out=out,
        settings=settings,
        pretrain=pretrain,
        pretrain_argv=pretrain_argv,
        interact=interact_config(interact_argv + arms[INTERACT] + on_device),
        interact_argv=interact_argv,
        arms=arms,
        starts=starts,
        seeds=options.seeds or scale.seeds,
        on_device=on_device,
    )


def train_students(plan: Plan) -> list[Student]:
    """All checkpoints to evaluate, after running every run that is not finished yet."""
    pretraining = plan.out / "pretrain"
    train(pretraining, plan.pretrain_argv, plan.on_device, plan.pretrain.words)
    students = []
    milestones = {}
    for words in MILESTONES:
        path = pretraining / "checkpoints" / milestone_name(words)
        if path.exists():
            milestones[words] = path
            students.append(Student(BEFORE, words, 0, words, path))
    for arm, scorer in plan.arms.items():
        for seed, start in itertools.product(range(plan.seeds), plan.starts):
            run = plan.out / arm.replace("/", "_") / f"{start // MILLION}M-{seed}"
            argv = [*plan.interact_argv, "--init", str(milestones[start]), "--seed", str(seed)]
            argv += corpus_of_teacher(plan.pretrain, interact_config(plan.interact_argv + scorer))
            last = train(run, argv, scorer + plan.on_device)
            spent = checkpoint.read_counters(last)
            words_in = start + spent["words_in"]
            students.append(Student(arm, start, seed, words_in, last))
            if arm == INTERACT and seed == 0:
                words = words_in + spent["words_out"]
                more = plan.out / MORE / run.name
                copy_milestone(milestones[start], more)
                longer = ["--words", str(words)]
                last = train(more, plan.pretrain_argv, longer + plan.on_device, words)
                students.append(Student(MORE, start, 0, words, last))
    return students


def evaluate(plan: Plan, students: Sequence[Student]) -> tuple[str, list[Record]]:
    """The grader's name, and a record per student, which is saved in OUT/evaluation."""
    records = []
    replies = plan.out / "replies.jsonl"
    corpus = plan.pretrain.corpus
    with open_grader(plan.interact, corpus=corpus, replies=replies) as grader:
        for student in tqdm(students, desc="evaluation", unit="checkpoint"):
            parts = student.folder.relative_to(plan.out).parts
            path = plan.out / "evaluation" / f"{'-'.join(parts)}.json"
            if not path.exists():
                # interaction has folded its temperature into the weights of its students
                is_pretrained = student.arm in (BEFORE, MORE)
                temperature = plan.interact.temperature if is_pretrained else 1.0
                row = recipes.Row("", student.folder, temperature)
                measures = measure(row, grader, plan.pretrain, plan.interact, plan.settings)
                record = asdict(student) | {"measures": plain(measures)}
                del record["folder"]
                path.parent.mkdir(exist_ok=True)
                atomic_write(path, json.dumps(record, indent=1) + "\n")
            records.append(read_object(path))
        return str(grader.facts["scored_by"]), records


def copy_milestone(milestone: Path, run: Path) -> None:
    if not (run / CONFIG).exists():
        shutil.rmtree(run, ignore_errors=True)  # a partial copy
        shutil.copytree(milestone, run / "checkpoints" / milestone.name)
        atomic_write(run / CONFIG, (milestone.parents[1] / CONFIG).read_bytes())


def measure(
    row: recipes.Row,
    grader: Grader,
    pretrain: PretrainConfig,
    config: InteractConfig,
    settings: Record,
) -> Record:
    """The values of a checkpoint in the page's table. Random numbers, teacher and texts are the
    same for all checkpoints."""
    held_out = Openings(load_openings(config.openings), 0).held_out
    openings = list(itertools.islice(cycle(held_out), settings["stories"]))
    columns = recipes.measure(row, grader, config, openings)
    student, tokenizer, history = checkpoint.load(row.folder, pick_device(pretrain.device))
    student.divide_logits(row.temperature)
    if not learned_dull_text(
        history
    ):  # such a student was not trained on the grammar's text either
        shards = prepare(
            open_corpus(pretrain.corpus),
            vocab_size=pretrain.vocab_size,
            val_fraction=pretrain.val_fraction,
            seed=pretrain.seed,
        )
        _, bits_per_byte = validate(
            student, shards.val, tokenizer.token_sizes, VAL_SEQUENCES, 16, "stream"
        )
        columns = {name: columns[name] for name in OF_STORIES}
        columns["bits_per_byte"] = bits_per_byte
    if settings["blimp"]:
        columns["BLiMP"] = evaluate_pairs(student, tokenizer, settings["blimp"])["accuracy"]
    return columns


def write_page(
    out: Path, settings: Record, scorers: Sequence[str], records: Sequence[Record]
) -> Path:
    """The path of OUT/report.html, which is written here. scorers: the arms of interaction."""
    columns = dict.fromkeys(name for record in records for name in record["measures"])
    columns.pop("rewards", None)
    names = {BEFORE: "pretrained", INTERACT: "+ interaction", MORE: "+ more pretraining"}
    lines = []
    rows: dict[int, list[list[str]]] = defaultdict(list)  # rows of the table, by start
    for arm, colour in zip((BEFORE, INTERACT, MORE, *scorers[1:]), cycle(COLOURS), strict=False):
        name = names.get(arm, f"+ --reward {arm}")
        by_start: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            if record["arm"] == arm:
                by_start[record["start"]].append(record)
        words = []
        scores = []
        errors = []
        for start, seeds in sorted(by_start.items()):
            score, error = mean_and_error(seeds, "score")
            words.append(fmean(record["words"] for record in seeds))
            scores.append(score)
            errors.append(error)
            row = [f"{start / MILLION:.3g} M {name}", str(len(seeds))]
            row += [with_error(seeds, column) for column in columns]
            rows[start].append(row)
        lines.append(charts.Line(words, scores, colour, name, errors))
    figure = charts.chart(
        "Teacher’s score, 0 to 9",
        lines,
        x_name="words of pretraining and taken in",
        size=(640, 380),
    )
    note = (
        "Means and standard errors over the seeds of interaction. Students were trained only on the reward. Story, "
        "routine, list ...: fraction of the texts in each style. distinct_4 and clusters are over 64 stories. "
        "bits_per_byte, repeated_name and he_or_she are measured on unseen text; the last two are "
        "probabilities of the right word."
    )
    table_rows = [row for start in sorted(rows) for row in rows[start]]
    table = page.table(["Student", "Seeds", *columns], table_rows)
    sections = [
        f'<div style="max-width: 44rem">{figure}</div>',
        page.section("Trained measures and other measures", note, table),
        page.details("Settings", "", page.facts(settings.items())),
    ]
    title = "Can interaction replace pretraining?"
    subtitle = escape(f"scored by {settings['scored by']}")
    return page.write(out / "report.html", title, subtitle, sections)


def with_error(records: Sequence[Record], column: str) -> str:
    mean, error = mean_and_error(records, column)
    if error is None:
        return charts.number(mean)
    return f"{charts.number(mean)} ± {charts.number(error)}"


def mean_and_error(records: Sequence[Record], column: str) -> tuple[float | None, float | None]:
    """Mean (None without values) and standard error (None for a single value) of a column."""
    values = [record["measures"].get(column) for record in records]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return mean_of(known), None
    return mean_of(known), stdev(known) / math.sqrt(len(known))


if __name__ == "__main__":
    main()
