"""The experiment of the paper: its plan, its evaluation, and the order in which scripts/reproduce.py runs them.

One student is pretrained; from some milestones it interacts, interacts for a random reward ("random"), or is pretrained
further ("reading"). Every checkpoint then writes stories, which the teacher grades.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tinystory.config import INTERACT_PRESETS, PAPER_OPENING, PRETRAIN_PRESETS, InteractConfig, PretrainConfig
from tinystory.data.babylm import MILESTONES, milestone_name
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.evaluate.pairs import evaluate_pairs
from tinystory.evaluate.stories import story_measures, write_stories
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import pick_device
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError
from tinystory.run.folder import atomic_write, device_name, git_commit, plain, read_metrics, versions
from tinystory.student import checkpoint
from tinystory.studies.page import EVALUATION, EXPERIMENT, write_experiment_report
from tinystory.studies.parts import MILLION, Part, locked, run_parts
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

SEED = 1_000_003  # seed of the stories for evaluation, which no interaction uses
VAL_SEQUENCES = 256  # held-out sequences for bits per byte
OPENINGS = (  # which no interaction uses
    "One day,|There was once a little girl who|Tom and his dog|It was a cold night, and|Once there was a bear.|"
    "Mum said,|In the garden,|The old king"
).split("|")


@dataclass(frozen=True)
class Scale:
    """pretrain, interact: options on top of the preset; starts: millions of pretraining words when interaction begins;
    seeds, random_seeds: number of runs per start; stories: number graded per checkpoint and kind of opening."""

    preset: str
    pretrain: dict[str, Any]
    interact: dict[str, Any]
    starts: tuple[int, ...]
    seeds: int
    random_seeds: int
    stories: int


# The reward and the openings. All set the same options, so that no objective resumes a run of another.
OBJECTIVES = {
    "paper": dict(openings=PAPER_OPENING, max_new_tokens=90, diversity=0.0, unfinished=1.0),
    "demo": {name: getattr(InteractConfig, name) for name in ("openings", "max_new_tokens", "diversity", "unfinished")},
}
# The settings of docs/results.md, whatever the demo's are: those that learn most in minutes on a CPU (LOG.md), with one
# epoch over more stories and a weak KL penalty.
PRETRAIN = dict(weights_init="gpt2", optimizer="adamw", learning_rate=2e-3, packing="stream")
INTERACT = dict(
    stories_per_step=64, epochs=1, temperature=1.0, learning_rate=1e-4, lr_decay=False, sharpness_rate=0.0,
    advantage="gae", value_coef=1.0, kl_coef=0.02, kl_target=12.0, kl_horizon=10_000.0, eval_every=0,
)  # fmt: skip
SCALES = {
    "tiny": Scale(
        "demo", dict(PRETRAIN, corpus=["builtin"], words=3 * MILLION), dict(INTERACT, steps=40), (1, 2, 3), 2, 1, 128
    ),
    "small": Scale(
        "demo",
        dict(
            PRETRAIN, corpus=["tinystories"], words=10 * MILLION, n_embd=256, vocab_size=8192, batch_size=16,
            learning_rate=1.5e-3, warmup=0.05, eval_every=100,
        ),
        dict(INTERACT, steps=60),
        (1, 2, 5, 10), 3, 2, 256,
    ),
    "paper": Scale("paper", {}, {}, (20, 50, 90, 200, 500, 900), 1, 1, 512),
    # All of its steps and parts, with a student, a corpus and stories that a CPU takes in its stride.
    "rehearsal": Scale(
        "paper",
        dict(
            corpus=["builtin"], words=2 * MILLION, n_layer=1, n_head=1, n_embd=32, context=128, vocab_size=512,
            batch_size=16, micro_batch_size=16, learning_rate=4e-3, eval_every=500,
        ),
        dict(stories_per_step=12, micro_batch_size=12, eval_stories=4, budget_words=34_000),
        (1, 2), 1, 1, 64,
    ),
}  # fmt: skip


def plan(scale: Scale, out: Path, teacher: dict[str, Any], device: str) -> list[Part]:
    """Pretraining, then the interactions and their random control, with all options that are not defaults."""
    pretrain = {"words": PretrainConfig.words, "device": device, **PRETRAIN_PRESETS[scale.preset], **scale.pretrain}
    parts = [Part("pretrain", 0, 0, pretrain)]
    interact = {"steps": InteractConfig.steps, "device": device, **INTERACT_PRESETS[scale.preset], **scale.interact}
    for arm, seeds, grader in (
        ("interact", scale.seeds, teacher),
        ("random", scale.random_seeds, {"reward": "random"}),
    ):
        for seed in range(seeds):
            for start in scale.starts:
                init = out / "pretrain" / "checkpoints" / milestone_name(start * MILLION)
                options = {**interact, **grader, "seed": seed, "init": str(init)}
                parts.append(Part(arm, start * MILLION, seed, options))
    return parts


def plan_reading(parts: Sequence[Part], out: Path) -> list[Part]:
    """The control of further pretraining: from each start, as many words as its interactions took in and wrote on
    average."""
    controls = []
    for start in sorted({part.start for part in parts if part.arm == "interact"}):
        runs = [read_metrics(out / part.name)[-1] for part in parts if (part.arm, part.start) == ("interact", start)]
        words = start + sum(run["words_in"] + run["words_out"] for run in runs) // len(runs)
        controls.append(Part("reading", start, 0, {**parts[0].options, "words": words}))
    return controls


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A checkpoint to evaluate. words: of pretraining and taken in; arm, start, seed: of its Part ("before", 0 and 0
    for a milestone of pretraining)."""

    arm: str
    start: int
    seed: int
    words: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-{(self.start or self.words) // MILLION}M-{self.seed}"


def subjects(parts: Sequence[Part], out: Path) -> list[Subject]:
    """Every milestone of pretraining, then the last checkpoint of every other part."""
    folders = {words: out / "pretrain" / "checkpoints" / milestone_name(words) for words in MILESTONES}
    milestones = [Subject("before", 0, 0, words, folder) for words, folder in folders.items() if folder.exists()]
    last = []
    for part in parts[1:]:
        newest = checkpoint.newest(out / part.name)  # not the best one: no arm is to be chosen by its score
        assert newest is not None, f"{part.name} is done, so it has a checkpoint"
        counters = checkpoint.read_counters(newest)
        words = counters["words"] if part.pretrains else part.start + counters["words_in"]
        last.append(Subject(part.arm, part.start, part.seed, words, newest))
    return milestones + last


class CheckpointEvaluator:
    """Evaluates checkpoints, all with the same random numbers, teacher and texts. settings: all that the measures
    depend on; a measure taken with other settings is taken again."""

    def __init__(self, grader: Grader, pretrain: PretrainConfig, interact: InteractConfig, stories: int, blimp: str):
        self.grader, self.blimp = grader, blimp
        openings = Openings(load_openings(interact.openings), interact.seed).train
        self.device, self.corpus = pick_device(pretrain.device), open_corpus(pretrain.corpus, pretrain.documents)
        self.val = prepare(
            self.corpus, vocab_size=pretrain.vocab_size, val_fraction=pretrain.val_fraction, seed=pretrain.seed
        ).val
        self.settings: dict[str, Any] = dict(stories=stories, openings=openings, other_openings=OPENINGS, seed=SEED)
        self.settings |= dict(length=interact.max_new_tokens, temperature=interact.temperature)
        self.settings |= dict(corpus=pretrain.corpus, teacher=grader.facts["teacher"]["model"], blimp=blimp)

    def measure(self, folder: Path) -> dict[str, Any]:
        student, tokenizer, _ = checkpoint.load(folder, self.device)
        sampling: dict[str, Any] = {"n_stories": self.settings["stories"], "max_new_tokens": self.settings["length"]}
        sampling |= dict(temperature=self.settings["temperature"], seed=SEED)
        measures: dict[str, Any] = {
            name: story_measures(
                write_stories(student, tokenizer, openings=openings, **sampling), grade=self.grade, corpus=self.corpus
            )
            for name, openings in {"stories": self.settings["openings"], "other_openings": OPENINGS}.items()
        }
        _, bits = validate(student, self.val, tokenizer.token_sizes, VAL_SEQUENCES, 16, "stream")
        blimp = {"blimp": evaluate_pairs(student, tokenizer, self.blimp)} if self.blimp else {}
        blimp.get("blimp", {}).pop("predictions", None)
        return measures | {"bits_per_byte": bits} | blimp

    def grade(self, stories: Sequence[tuple[str, str]]) -> list[Mapping[str, float] | None]:
        return [grade.scores for grade in self.grader.grade_each(stories)]


def evaluate(subjects: Sequence[Subject], out: Path, evaluator: CheckpointEvaluator) -> None:
    """Write evaluation/NAME.json for each subject, unless it exists with the same settings."""
    for subject in tqdm(subjects, desc="evaluation", unit="checkpoint"):
        path = out / EVALUATION / f"{subject.name}.json"
        old = json.loads(path.read_bytes()) if path.exists() else {}
        if old.get("settings") != evaluator.settings or old.get("words") != subject.words:
            facts = {"arm": subject.arm, "start": subject.start, "seed": subject.seed, "words": subject.words}
            record = {**facts, "settings": evaluator.settings, "measures": evaluator.measure(subject.folder)}
            atomic_write(path, json.dumps(plain(record), indent=1) + "\n")


def reproduce(
    scale: Scale, out: Path, teacher: dict[str, Any], *, name: str, device: str, blimp: str, jobs: int
) -> Path:
    """The path of the report, after what is unfinished of the experiment has run. teacher: options for
    train_interact.py."""
    parts = plan(scale, out, teacher, device)
    pretrain, interact = PretrainConfig(**parts[0].options), InteractConfig(**parts[1].options)
    missing = [start for start in scale.starts if start * MILLION not in MILESTONES or start * MILLION > pretrain.words]
    if missing:
        raise UserError(
            f"pretraining on {pretrain.words:,} words leaves no checkpoint at {missing[0]} M: choose --milestones that "
            "it reaches, among 1 to 9, 10 to 90 by 10, 100 to 1000 by 100"
        )
    (out / EVALUATION).mkdir(parents=True, exist_ok=True)
    with locked(out) as lock:
        run_parts(parts[:1], out, scale.preset, jobs, lock)
        run_parts(parts[1:], out, scale.preset, jobs, lock)
        controls = plan_reading(parts, out)
        run_parts(controls, out, scale.preset, jobs, lock)
        replies, seeded = out / EVALUATION / "replies.jsonl", dataclasses.replace(interact, seed=SEED)
        with open_grader(seeded, builtin_teacher, corpus=pretrain.corpus, replies=replies) as grader:
            evaluator = CheckpointEvaluator(grader, pretrain, interact, scale.stories, blimp)
            evaluate(subjects(parts + controls, out), out, evaluator)
        facts = dict(scale=name, teacher=evaluator.settings["teacher"], **dataclasses.asdict(scale))
        facts |= dict(evaluation=evaluator.settings, device=device_name(str(evaluator.device)))
        facts |= dict(versions=versions(), git_commit=git_commit())
        atomic_write(out / EXPERIMENT, json.dumps(facts, indent=1) + "\n")
        return write_experiment_report(out)
