"""The paper's experiment as one command: does interaction replace reading many times as many words?

    python scripts/reproduce.py --scale tiny             takes minutes: shows the output, proves nothing
    python scripts/reproduce.py --scale small --corpus stories.txt --out runs/small
    python scripts/reproduce.py --scale paper --teacher-url http://127.0.0.1:8000/v1

One student is pretrained, with a checkpoint at every milestone of words. From some of these it continues in three ways:

    interact   it writes stories and the teacher scores them, for several seeds
    random     the same with scores drawn from a hash of the story: everything but the teacher's judgement
    reading    it reads as many further words as interaction took in and wrote, while the learning rate decays to 0

A story earns what it earns in the paper, or with --objective demo what it earns in train_interact.py's own defaults:
many openings, a reward for being different from the other stories, and one for an end.

Every checkpoint then writes stories with the same random numbers, the teacher grades them, and OUT/report.html compares
them. Every part is a run of train_pretrain.py or train_interact.py in its own folder. Finished parts are not run again
and interrupted ones are resumed, so after Ctrl-C or a kill the same command continues.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tinystory.config import INTERACT_PRESETS, PAPER_OPENING, PRETRAIN_PRESETS, InteractConfig, PretrainConfig
from tinystory.data.babylm import MILESTONES, milestone_name
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.evaluate.pairs import evaluate_pairs
from tinystory.evaluate.stories import story_measures
from tinystory.evaluate.validation import validate
from tinystory.ops.compute import pick_device
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write, device_name, git_commit, plain, read_metrics, versions
from tinystory.student import checkpoint
from tinystory.studies.page import EVALUATION, EXPERIMENT, write_experiment_report
from tinystory.studies.parts import MILLION, Part, Progress, locked, run_parts
from tinystory.teacher.grader import Grader, open_grader

SEED = 1_000_003  # seed of the stories for evaluation, which no interaction uses
VAL_SEQUENCES = 256  # held-out sequences for bits per byte
# Openings that no interaction has seen.
OPENINGS = [
    "One day,", "There was once a little girl who", "Tom and his dog", "It was a cold night, and",
    "Once there was a bear.", "Mum said,", "In the garden,", "The old king",
]  # fmt: skip
RANDOM = {"reward": "random"}


@dataclass(frozen=True)
class Scale:
    """pretrain, interact: options on top of the preset; starts: millions of words read when interaction begins; seeds,
    random_seeds: number of runs per start; stories: number graded per checkpoint and kind of opening."""

    preset: str
    pretrain: dict[str, Any]
    interact: dict[str, Any]
    starts: tuple[int, ...]
    seeds: int
    random_seeds: int
    stories: int


# What a story earns, and to which opening. All name the same options, so that none goes on with a run of another.
OBJECTIVES = {
    "paper": dict(openings=PAPER_OPENING, max_new_tokens=90, diversity=0.0, unfinished=1.0),
    "demo": {name: getattr(InteractConfig, name) for name in ("openings", "max_new_tokens", "diversity", "unfinished")},
}
# The settings of docs/results.md, whatever the demo's are: those that learn most in minutes on a CPU (LOG.md), with one
# epoch over more stories and a weak KL penalty.
READ = dict(weights_init="gpt2", optimizer="adamw", learning_rate=2e-3, packing="stream")
BRISK = dict(
    stories_per_step=64, epochs=1, temperature=1.0, learning_rate=1e-4, lr_decay=False, sharpness_rate=0.0,
    signal_gate=False, critic="head", value_coef=1.0, kl_coef=0.02, kl_target=12.0, kl_horizon=10_000.0, eval_every=0,
)  # fmt: skip
SCALES = {
    "tiny": Scale(
        "demo", dict(READ, corpus=["builtin"], words=3 * MILLION), dict(BRISK, steps=40), (1, 2, 3), 2, 1, 128
    ),
    "small": Scale(
        "demo",
        dict(
            READ, corpus=["tinystories"], words=10 * MILLION, n_embd=256, vocab_size=8192, batch_size=16,
            learning_rate=1.5e-3, warmup=0.05, eval_every=100,
        ),
        dict(BRISK, steps=60),
        (1, 2, 5, 10), 3, 2, 256,
    ),
    "paper": Scale("paper", {}, {}, (20, 50, 90, 200, 500, 900), 1, 1, 512),
}  # fmt: skip


def plan(scale: Scale, out: Path, teacher: dict[str, Any], device: str) -> list[Part]:
    """Pretraining, then the interactions and their random control, with all options that are not defaults."""
    reading = {"words": PretrainConfig.words, "device": device, **PRETRAIN_PRESETS[scale.preset], **scale.pretrain}
    parts = [Part("pretrain", 0, 0, reading)]
    needed = {name: getattr(InteractConfig, name) for name in ("steps", "stories_per_step", "epochs")}
    writing = {**needed, "device": device, **INTERACT_PRESETS[scale.preset], **scale.interact}
    for arm, seeds, reward in (("interact", scale.seeds, teacher), ("random", scale.random_seeds, RANDOM)):
        for seed in range(seeds):
            for start in scale.starts:
                init = out / "pretrain" / "checkpoints" / milestone_name(start * MILLION)
                options = {**writing, **reward, "seed": seed, "init": str(init)}
                parts.append(Part(arm, start * MILLION, seed, options))
    return parts


def plan_reading(parts: Sequence[Part], out: Path) -> list[Part]:
    """The reading control: from each start, as many words as its interactions took in and wrote on average."""
    further = []
    for start in sorted({part.start for part in parts if part.arm == "interact"}):
        runs = [read_metrics(out / part.name)[-1] for part in parts if (part.arm, part.start) == ("interact", start)]
        words = start + sum(run["words_in"] + run["words_out"] for run in runs) // len(runs)
        further.append(Part("reading", start, 0, {**parts[0].options, "words": words}))
    return further


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A checkpoint to evaluate. words: read and taken in, in total; start, seed: as in Part (start 0 for "before")."""

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
    found = [Subject("before", 0, 0, words, folder) for words, folder in folders.items() if folder.exists()]
    for part in parts[1:]:
        newest = checkpoint.newest(out / part.name)  # not the best one: no arm is to be chosen by its score
        assert newest is not None, f"{part.name} is done, so it has a checkpoint"
        counters = checkpoint.read_counters(newest)
        words = counters["words"] if part.reads else part.start + counters["words_in"]
        found.append(Subject(part.arm, part.start, part.seed, words, newest))
    return found


class Judge:
    """Evaluates checkpoints, all with the same random numbers, teacher and texts."""

    def __init__(self, grader: Grader, reading: PretrainConfig, writing: InteractConfig, stories: int, blimp: str):
        self.grader, self.stories, self.blimp = grader, stories, blimp
        self.openings = Openings(load_openings(writing.openings), writing.seed).train
        self.length = writing.max_new_tokens
        self.temperature = writing.temperature
        self.device = pick_device(reading.device)
        self.corpus = open_corpus(reading.corpus)
        self.val = prepare(
            self.corpus, vocab_size=reading.vocab_size, val_fraction=reading.val_fraction, seed=reading.seed
        ).val
        # Everything that the measures depend on: a measure taken with other settings is taken again.
        self.settings: dict[str, Any] = dict(
            stories=stories, openings=self.openings, other_openings=OPENINGS, length=self.length,
            temperature=self.temperature, seed=SEED, corpus=reading.corpus, teacher=grader.facts["teacher"]["model"],
            blimp=blimp,
        )  # fmt: skip

    def measure(self, folder: Path) -> dict[str, Any]:
        student, tokenizer, _ = checkpoint.load(folder, self.device)
        told = [
            story_measures(
                student, tokenizer, openings=openings, n_stories=self.stories, max_new_tokens=self.length,
                temperature=self.temperature, seed=SEED, grade=self.grade, corpus=self.corpus,
            )
            for openings in (self.openings, OPENINGS)
        ]  # fmt: skip
        _, bits = validate(student, self.val, tokenizer.token_sizes, VAL_SEQUENCES, 16, "stream")
        measures = {"stories": told[0], "other_openings": told[1], "bits_per_byte": bits}
        return measures | ({"blimp": evaluate_pairs(student, tokenizer, self.blimp)} if self.blimp else {})

    def grade(self, opening: str, stories: Sequence[str]) -> list[Mapping[str, float] | None]:
        return [grade.scores for grade in self.grader.grade(opening, stories)]


def evaluate(found: Sequence[Subject], out: Path, judge: Judge, progress: Progress) -> None:
    """Write evaluation/NAME.json for each subject, unless it exists with the same settings."""
    for subject in found:
        path = out / EVALUATION / f"{subject.name}.json"
        facts = {"arm": subject.arm, "start": subject.start, "seed": subject.seed, "words": subject.words}
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        if kept.get("settings") != judge.settings or kept.get("words") != subject.words:
            began = time.monotonic()
            record = {**facts, "settings": judge.settings, "measures": judge.measure(subject.folder)}
            atomic_write(path, json.dumps(plain(record), indent=1) + "\n")
            progress.done(f"{EVALUATION}/{subject.name}", time.monotonic() - began)
        else:
            progress.skip(f"{EVALUATION}/{subject.name}")


def reproduce(
    scale: Scale, out: Path, teacher: dict[str, Any], *, name: str, device: str, blimp: str, jobs: int, lock: int
) -> Path:
    """Run the experiment, or the rest of it. Returns the path of the report. teacher: options for train_interact.py."""
    parts = plan(scale, out, teacher, device)
    reading, writing = PretrainConfig(**parts[0].options), InteractConfig(**parts[1].options)
    milestones = [m for m in MILESTONES if m <= reading.words]
    missing = [start for start in scale.starts if start * MILLION not in milestones]
    if missing:
        raise UserError(
            f"reading {reading.words:,} words leaves no checkpoint at {missing[0]} M: choose --milestones among "
            "those that it does (1 to 9, 10 to 90 by 10, 100 to 1000 by 100)"
        )

    # All the work, for the remaining time.
    progress = Progress()
    for part in parts:
        progress.expect(part.name, part.work, part.fraction_done(out))
    written = writing.steps * writing.stories_per_step * writing.max_new_tokens
    for start in scale.starts:
        progress.expect(f"reading/{start}M-0", written)
    names = [f"before-{m // MILLION}M-0" for m in milestones] + [f"reading-{start}M-0" for start in scale.starts]
    for each in names + [part.name.replace("/", "-") for part in parts[1:]]:
        progress.expect(f"{EVALUATION}/{each}", 2 * scale.stories * writing.max_new_tokens)

    how = (out, scale.preset, jobs, lock, progress)
    run_parts(parts[:1], *how)
    run_parts(parts[1:], *how)
    further = plan_reading(parts, out)
    run_parts(further, *how)
    grading, replies = dataclasses.replace(writing, seed=SEED), out / EVALUATION / "replies.jsonl"
    with open_grader(grading, builtin_teacher, corpus=reading.corpus, replies=replies) as grader:
        judge = Judge(grader, reading, writing, scale.stories, blimp)
        evaluate(subjects(parts + further, out), out, judge, progress)
        described = dict(
            scale=name, teacher=judge.settings["teacher"], **dataclasses.asdict(scale), evaluation=judge.settings,
            device=device_name(str(judge.device)), versions=versions(), git_commit=git_commit(),
        )  # fmt: skip
    atomic_write(out / EXPERIMENT, json.dumps(described, indent=1) + "\n")
    return write_experiment_report(out)


# ---- the command ----------------------------------------------------------------------------------------------------


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--out", type=Path, help="folder of the experiment (default: runs/reproduce-SCALE)")
    parser.add_argument("--corpus", nargs="+", metavar="NAME", help="corpora for pretraining (default: set by --scale)")
    parser.add_argument("--teacher-url", nargs="+", default=[], help="OpenAI-compatible endpoint (default: built in)")
    parser.add_argument("--teacher-model", nargs="+", default=[], help="model name (default: the first listed)")
    parser.add_argument("--teacher-concurrency", type=int, default=InteractConfig.teacher_concurrency)
    parser.add_argument("--milestones", nargs="+", type=int, metavar="M", help="starts of interaction, million words")
    parser.add_argument("--seeds", type=int, help="interactions per milestone")
    parser.add_argument("--random-seeds", type=int, help="random-reward runs per milestone")
    parser.add_argument("--steps", type=int, help="PPO steps per interaction")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="paper", help="what a story earns, and its opening (default: paper)"
    )
    parser.add_argument("--blimp", default="", help="folder of BLiMP's .jsonl files, evaluated too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=0, help="parallel parts (default: one per core, or one on a GPU)")
    options = parser.parse_args(argv)

    scale = SCALES[options.scale]
    scale = dataclasses.replace(
        scale,
        pretrain=scale.pretrain | ({"corpus": options.corpus} if options.corpus else {}),
        interact=OBJECTIVES[options.objective] | scale.interact | ({"steps": options.steps} if options.steps else {}),
        starts=tuple(options.milestones or scale.starts),
        seeds=options.seeds or scale.seeds,
        random_seeds=scale.random_seeds if options.random_seeds is None else options.random_seeds,
    )
    teacher = {name: value for name in ("teacher_url", "teacher_model") if (value := getattr(options, name))}
    teacher |= {"teacher_concurrency": options.teacher_concurrency} if options.teacher_url else {}
    jobs = options.jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    out = options.out or Path("runs") / f"reproduce-{options.scale}"
    print(f"objective {options.objective}: {', '.join(f'{k} {v!r}' for k, v in OBJECTIVES[options.objective].items())}")
    (out / EVALUATION).mkdir(parents=True, exist_ok=True)
    # Treat kill PID like Ctrl-C: the parts save a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    with locked(out) as lock:
        report = reproduce(
            scale, out, teacher, name=options.scale, device=options.device, blimp=options.blimp, jobs=jobs, lock=lock
        )
    print(f"report: {report}")


if __name__ == "__main__":
    main()
