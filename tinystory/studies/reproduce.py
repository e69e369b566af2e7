"""The paper's experiment: its runs of both train commands, the evaluation of their checkpoints, and the page.

Each run has a process and a folder of its own. The folder tells whether the run is finished, and `--resume` goes on
from it, so a kill leaves nothing inconsistent.
"""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tinystory.config import INTERACT_PRESETS, PAPER_OPENING, PRETRAIN_PRESETS, InteractConfig, PretrainConfig, parse
from tinystory.data.babylm import MILESTONES, milestone_name
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.evaluate.pairs import evaluate_pairs
from tinystory.evaluate.stories import OPENINGS, story_measures, write_stories
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import pick_device
from tinystory.report import charts, page
from tinystory.report.evaluation import at
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, SAMPLES, Record, atomic_write, plain, read_metrics
from tinystory.run.paths import ROOT
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

MILLION = 10**6
SEED = 1_000_003  # seed of the stories for evaluation, which no interaction uses
VAL_SEQUENCES = 256  # held-out sequences for bits per byte
BEFORE, INTERACT, MORE = "before", "interact", "more"  # arms; a control's is its value of --reward
SCORE = ("stories", "score_mean")
MEASURES = {  # columns of the page's table: path into a record's measures
    "Score": SCORE,
    "Score, other openings": ("other_openings", "score_mean"),
    "distinct_4": ("stories", "distinct_4"),
    "Clusters of 10": ("stories", "story_clusters_10"),
    "Ended": ("stories", "ended_eos_share"),
    "Copied": ("stories", "copied_share"),
    "Words": ("stories", "length_mean"),
    "Bits per byte": ("bits_per_byte",),
    "BLiMP": ("blimp", "accuracy"),
}


@dataclass(frozen=True)
class Scale:
    """preset: of both train commands; pretrain, interact: their further options, as typed; starts: millions of
    pretraining words after which interaction begins; seeds: of each arm of interaction, per start; stories: number
    graded per checkpoint and kind of opening."""

    preset: str
    pretrain: str
    interact: str
    starts: tuple[int, ...]
    seeds: int
    stories: int


# The settings of docs/results.md, whatever the demo's are: those that learn most in minutes on a CPU (LOG.md), with one
# epoch over more stories, a weak KL penalty, and the paper's reward.
_PRETRAIN = "--weights-init gpt2 --optimizer adamw --packing stream"
_INTERACT = (
    "--stories-per-step 64 --learning-rate 1e-4 --no-lr-decay --sharpness-rate 0 --learner gae --value-coef 1 "
    "--kl-coef 0.02 --kl-target 12 --kl-horizon 10000 --eval-every 0 "
    f"--openings {shlex.quote(PAPER_OPENING)} --max-new-tokens 90 --diversity 0 --unfinished 1"
)
SCALES = {
    "tiny": Scale("demo", f"{_PRETRAIN} --learning-rate 2e-3 --words 3M", f"{_INTERACT} --steps 40", (1, 2, 3), 2, 128),
    "small": Scale(
        "demo",
        f"{_PRETRAIN} --learning-rate 1.5e-3 --warmup 0.05 --corpus tinystories --words 10M --n-layer 4 --n-head 4 "
        "--n-embd 256 --vocab-size 8192 --batch-size 16 --eval-every 100",
        f"{_INTERACT} --steps 60",
        (1, 2, 5, 10), 3, 256,
    ),
    "paper": Scale("paper", "", "", (20, 50, 90, 200, 500, 900), 1, 512),
}  # fmt: skip


class TrainingRun(NamedTuple):
    """A run of a train command. start: pretraining words of the student that it begins with; argv: its options;
    again: further ones, which a resumed run is given too; words: at which pretraining is finished."""

    arm: str
    start: int
    seed: int
    folder: Path
    argv: Sequence[str]
    again: Sequence[str]
    words: int = 0

    def finished(self) -> bool:
        if not self.words:
            return (self.folder / SAMPLES).exists()  # the last file that an interaction writes
        newest = checkpoint.newest(self.folder)
        return newest is not None and checkpoint.read_counters(newest)["words"] >= self.words

    def begin(self) -> subprocess.Popen[bytes]:
        """Its process, in a session of its own: Ctrl-C reaches only ours, which passes it on."""
        script = ROOT / ("train_pretrain.py" if self.words else "train_interact.py")
        options = [*(["--resume"] if (self.folder / CONFIG).exists() else self.argv), *self.again]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                [sys.executable, str(script), "--out", str(self.folder), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def run_all(runs: Sequence[TrainingRun]) -> None:
    """Run what is unfinished, one after the other. Raises UserError if a run fails. However this function ends, the run
    ends too, after it has saved a checkpoint."""
    for run in (run for run in runs if not run.finished()):
        print(f"{run.folder} ...", flush=True)
        process = run.begin()
        try:
            process.wait()
        finally:
            process.terminate()
            process.wait()
        if not run.finished():
            raise UserError(
                f"{run.folder} ended with exit code {process.returncode} before it was done; "
                f"{run.folder.with_suffix('.log')} says why; the same command continues from there"
            )


def reproduce(scale: Scale, out: Path, *, teacher: str, controls: Sequence[str], device: str, blimp: str) -> Path:
    """The path of the page, after what is unfinished of the experiment has run. teacher: options of train_interact.py;
    controls: values of its --reward."""
    on_device = ["--device", device]
    pretrain_argv = ["--preset", scale.preset, *shlex.split(scale.pretrain)]
    interact_argv = ["--preset", scale.preset, *shlex.split(scale.interact)]
    scorers = {INTERACT: shlex.split(teacher)} | {control: ["--reward", control] for control in controls}
    pretrain: PretrainConfig = parse(PretrainConfig, PRETRAIN_PRESETS, [*pretrain_argv, *on_device])
    configs = [parse(InteractConfig, INTERACT_PRESETS, [*interact_argv, *scorer]) for scorer in scorers.values()]
    starts = [start * MILLION for start in scale.starts]
    if missing := [start for start in starts if start not in MILESTONES or start > pretrain.words]:
        raise UserError(
            f"pretraining on {pretrain.words:,} words leaves no checkpoint at {missing[0] // MILLION} M: choose "
            "--milestones that it reaches, among 1 to 9, 10 to 90 by 10, 100 to 1000 by 100"
        )
    settings = {name: getattr(scale, name) for name in ("preset", "pretrain", "interact", "stories")} | {"blimp": blimp}
    (out / "evaluation").mkdir(parents=True, exist_ok=True)
    require_same(out / "experiment.json", settings)

    pretraining = TrainingRun(BEFORE, 0, 0, out / "pretrain", pretrain_argv, on_device, pretrain.words)
    run_all([pretraining])
    milestones = {words: pretraining.folder / "checkpoints" / milestone_name(words) for words in MILESTONES}
    interactions = []
    for arm, scorer in scorers.items():
        for seed in range(scale.seeds):
            for start in starts:
                folder = out / arm.replace("/", "_") / f"{start // MILLION}M-{seed}"
                argv = [*interact_argv, "--init", str(milestones[start]), "--seed", str(seed)]
                interactions.append(TrainingRun(arm, start, seed, folder, argv, [*scorer, *on_device]))
    run_all(interactions)
    first_seed = [run for run in interactions if (run.arm, run.seed) == (INTERACT, 0)]
    more = [more_pretraining(run, milestones[run.start], on_device) for run in first_seed]
    run_all(more)

    students = [(pretraining, words, path) for words, path in milestones.items() if path.exists()]
    students += [(run, *last_checkpoint(run)) for run in [*interactions, *more]]
    config, records = replace(configs[0], seed=SEED), []
    with open_grader(config, builtin_teacher, corpus=pretrain.corpus, replies=out / "replies.jsonl") as grader:
        for run, words, folder in tqdm(students, desc="evaluation", unit="checkpoint"):
            record: Record = dict(arm=run.arm, start=run.start or words, seed=run.seed, words=words)
            path = out / "evaluation" / f"{'-'.join(folder.relative_to(out).parts)}.json"
            if not path.exists():
                record["measures"] = plain(measure(folder, grader, pretrain, config, scale.stories, blimp))
                atomic_write(path, json.dumps(record, indent=1) + "\n")
            records.append(json.loads(path.read_bytes()))
    return write_page(out, settings | {"scored by": str(grader.facts["scored_by"])}, list(scorers), records)


def require_same(path: Path, settings: Record) -> None:
    """Write what all runs of an experiment share. Raises UserError if the file has something else."""
    before = json.loads(path.read_bytes()) if path.exists() else settings
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        old, new = before.get(changed[0]), settings[changed[0]]
        raise UserError(f"{path.parent} was begun with {changed[0]} {old!r}, not {new!r}: choose another --out")
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


def more_pretraining(interaction: TrainingRun, milestone: Path, on_device: Sequence[str]) -> TrainingRun:
    """Pretraining on as many further words as an interaction took in and wrote, from a copy of the milestone that it
    began with."""
    last, start = read_metrics(interaction.folder)[-1], interaction.start
    folder, run = interaction.folder.parents[1] / MORE / interaction.folder.name, milestone.parents[1]
    if not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)  # copied in part
        shutil.copytree(milestone, folder / "checkpoints" / milestone.name)
        atomic_write(folder / CONFIG, (run / CONFIG).read_bytes())
    words = start + last["words_in"] + last["words_out"]
    return TrainingRun(MORE, start, 0, folder, (), ["--words", str(words), *on_device], words)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def last_checkpoint(run: TrainingRun) -> tuple[int, Path]:
    """Words of pretraining and taken in, and the folder: not of the best one, for no arm is to be chosen by its
    score."""
    folder = checkpoint.newest(run.folder)
    assert folder is not None, f"{run.folder} is finished, so it has a checkpoint"
    counters = checkpoint.read_counters(folder)
    return counters["words"] if run.words else run.start + counters["words_in"], folder


def measure(
    folder: Path, grader: Grader, pretrain: PretrainConfig, config: InteractConfig, stories: int, blimp: str
) -> dict[str, Any]:
    """The measures of a checkpoint, all with the same random numbers, teacher and texts."""
    student, tokenizer, _ = checkpoint.load(folder, pick_device(pretrain.device))
    corpus = open_corpus(pretrain.corpus, pretrain.documents)
    sizes: dict[str, Any] = dict(vocab_size=pretrain.vocab_size, val_fraction=pretrain.val_fraction, seed=pretrain.seed)
    sampling: dict[str, Any] = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=SEED)

    def grade(pairs: Sequence[tuple[str, str]]) -> list[Mapping[str, float] | None]:
        return [grade.scores for grade in grader.grade_each(pairs)]

    measures: dict[str, Any] = {}
    training = Openings(load_openings(config.openings), 0).train
    for name, openings in (("stories", training), ("other_openings", OPENINGS)):
        samples = write_stories(student, tokenizer, openings=openings, n_stories=stories, **sampling)
        measures[name] = story_measures(samples, grade=grade, corpus=corpus)
    val = prepare(corpus, **sizes).val
    measures["bits_per_byte"] = validate(student, val, tokenizer.token_sizes, VAL_SEQUENCES, 16, "stream")[1]
    if blimp:
        measures["blimp"] = {"accuracy": evaluate_pairs(student, tokenizer, blimp)["accuracy"]}
    return measures


# ---- the page -------------------------------------------------------------------------------------------------------


def write_page(out: Path, settings: Record, scorers: Sequence[str], records: Sequence[Record]) -> Path:
    """The path of OUT/report.html, which is written with its figure, OUT/figure.svg. scorers: the arms of interaction;
    records: arm, start, seed, words and measures of each checkpoint."""
    columns = {name: path for name, path in MEASURES.items() if mean_and_error(records, path)[0] is not None}
    groups: dict[str, dict[int, list[Record]]] = {}
    for record in sorted(records, key=lambda record: record["start"]):
        groups.setdefault(record["arm"], {}).setdefault(record["start"], []).append(record)
    lines, rows = [], list[tuple[int, list[str]]]()
    names = {BEFORE: "pretrained", INTERACT: "+ interaction", MORE: "+ more pretraining"}
    colours = ("plain", "reward", "readability", "coherence", "creativity", "muted")
    for arm, colour in zip((BEFORE, INTERACT, MORE, *scorers[1:]), colours, strict=False):
        name, by_start = names.get(arm, f"+ --reward {arm}"), groups.get(arm, {})
        means, errors = zip(*(mean_and_error(group, SCORE) for group in by_start.values()), strict=True)
        words = [statistics.fmean(record["words"] for record in group) for group in by_start.values()]
        lines.append(charts.Line(words, means, colour, name, errors))
        for start, group in by_start.items():
            cells = [plus_minus(*mean_and_error(group, path)) for path in columns.values()]
            rows.append((start, [f"{start / MILLION:.3g} M {name}", str(len(group)), *cells]))
    figure = charts.chart(
        "Teacher’s score, 0 to 9", lines, x_name="words of pretraining and taken in", log_x=True, size=(640, 380)
    )
    atomic_write(out / "figure.svg", charts.standalone(figure))
    note = (
        "Mean and standard error over the seeds of interaction. Only the score is rewarded; distinct_4: distinct word "
        "4-grams over all 4-grams; copied: the longest phrase of the corpus in a story; bits per byte: held-out text."
    )
    table = page.table(["Student", "Seeds", *columns], [cells for _, cells in sorted(rows, key=lambda row: row[0])])
    facts = page.details("How it was run", "", page.facts(settings.items()))
    sections = [
        f'<div style="max-width: 44rem">{figure}</div>',
        page.section("What was rewarded and what was not", note, table),
        facts,
    ]
    subtitle = escape(f"scored by {settings['scored by']}")
    return page.write(out / "report.html", "Does interaction replace pretraining?", subtitle, sections)


def mean_and_error(records: Sequence[Record], path: Sequence[str]) -> tuple[float | None, float | None]:
    """Mean and standard error of the measure at the end of a path, over the records that have it; None for the mean of
    none, and for the error of one."""
    values = [value for record in records if (value := at(record["measures"], path)) is not None]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values) if values else None, error


def plus_minus(mean: float | None, error: float | None) -> str:
    if mean is None:
        return charts.number(None)
    decimals = 2 if abs(mean) < 10 else 1
    return f"{mean:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")
