"""Recipes of interaction side by side, from the same pretrained students: the tables of docs/results.md.

    python scripts/recipes.py --seeds 0 1 2 --options "" "--lam 0.9" "--steps 16 --stories-per-step 256"

For each seed a student is pretrained by the defaults of train_pretrain.py, and for each text of --options trained by
train_interact.py with these. What is finished is not run again. Then each student, the untouched one first, writes
fresh stories, which the built-in teacher grades. Beside them stand lower temperatures, and the best of several stories,
chosen by their reward or, without a grade, by the student's own likelihood; these also with the first of --options. The
rows are printed as Markdown, means over the seeds; OUT/rows.jsonl has each seed's.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory.config import InteractConfig, add_number
from tinystory.data.corpus import Corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.coreference import coreference, unseen_stories
from tinystory.evaluate.scoring import bits_per_byte
from tinystory.evaluate.stories import distinct_ngrams
from tinystory.ops.compute import resolve
from tinystory.rl import ppo
from tinystory.rl.reward import best_of_n, cluster_sizes, story_rewards
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.folder import SAMPLES, read_metrics
from tinystory.run.paths import ROOT
from tinystory.student import checkpoint
from tinystory.student.generate import Story, generate
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

CONFIG = InteractConfig()
FIRST_INDEX = 2 * 10**9  # of the stories that are measured: no run draws these random numbers
COREFERENCE = 300  # stories
CLUSTERED = 64  # stories over which distinct_4 and clusters are counted
OPENINGS = Openings(load_openings(CONFIG.openings), CONFIG.seed)


class Row(NamedTuple):
    name: str
    folder: Path
    temperature: float = 1.0
    n: int = 1
    graded: bool = False  # the best of n is chosen by reward


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of pretraining and interaction")
    parser.add_argument("--options", nargs="+", default=[""], metavar="TEXT", help="of train_interact.py, one per run")
    add_number(
        parser,
        "--stories",
        256,
        "[64, 1e6]",
        "stories of a row to held-out openings, each compared with the others; to openings of training three such sets",
    )
    options = parser.parse_args(argv)
    try:
        flags = {text: shlex.split(text) for text in options.options}
    except ValueError as error:
        raise UserError(f"--options: {str(error).lower()}; write each text as on a command line") from None
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for seed in options.seeds:
        start = options.out / f"pretrain-{seed}"
        if not (start / "report.html").exists():  # the last file that a pretraining writes
            run("train_pretrain.py", start, seed)
        rows = [Row(f"temperature {t}", start, t) for t in (1.0, 0.8, 0.7, 0.6)]
        rows += [Row(f"best of {n}", start, n=n, graded=True) for n in (2, 4, 8)]
        rows += [Row("best of 4, ungraded", start, n=4)]
        for text in options.options:
            name = f"`{text}`" if text else "the default"
            out = options.out / f"{'_'.join(text.replace('--', '').split()) or 'default'}-{seed}"
            if not (out / SAMPLES).exists():  # the last file that an interaction writes
                run("train_interact.py", out, seed, "--init", str(start), *flags[text])
            rows.append(Row(name, out))
            if text == options.options[0]:
                rows += [
                    Row(f"{name}, best of 4", out, n=4, graded=True),
                    Row(f"{name}, best of 4, ungraded", out, n=4),
                ]
        corpus = checkpoint.load(checkpoint.find(start))[2]["corpus"]
        with open_grader(CONFIG, builtin_teacher, corpus=corpus) as grader:
            for row in rows:
                measures = measure(row, start, grader, options.stories)
                records.append({"name": row.name, "seed": seed} | measures)
                with open(options.out / "rows.jsonl", "a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    columns = [column for column in records[-1] if column not in ("name", "seed")]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in dict.fromkeys(record["name"] for record in records):
        means = (mean([record[column] for record in records if record["name"] == name]) for column in columns)
        print(f"| {name} | {' | '.join('' if math.isnan(x) else f'{x:.3f}' for x in means)} |")


def run(script: str, out: Path, seed: int, *more: str) -> None:
    """Run a train command in a process of its own; it goes on where it was interrupted."""
    more = ("--resume",) if checkpoint.newest(out) else (*more, "--seed", str(seed))
    if code := subprocess.run([sys.executable, str(ROOT / script), "--out", str(out), *more]).returncode:
        raise UserError(f"{script} --out {out} ended with exit code {code}: its message is above")


@torch.no_grad()
def measure(row: Row, start: Path, grader: Grader, count: int) -> dict[str, float | None]:
    """Measures of fresh stories by the newest checkpoint of a run (no run is to be shown by its best). KL, in nats per
    story, is that to the start; for a best of n it is an upper bound (Beirami et al. 2024, arXiv 2401.01879)."""
    compute = resolve("auto", "auto", "auto")
    reference, tokenizer, _ = checkpoint.load(checkpoint.find(start), compute.device)
    student = checkpoint.load(checkpoint.newest(row.folder) or row.folder, compute.device)[0]
    steps = [] if row.folder == start else read_metrics(row.folder)
    parts = ("rollout_s", "reference_s", "teacher_s", "update_s")
    measures: dict[str, float | None] = {"seconds": float(sum(step[part] for step in steps for part in parts))}
    training = [OPENINGS[FIRST_INDEX + i] for i in range(3 * count)]
    held_out = list(islice(cycle(OPENINGS.held_out), count))
    for where, openings in (("", training), ("held_out_", held_out)):
        kls: list[float] = []
        rewards: list[float | None] = []
        stories: list[Story] = []
        scores: list[float | None] = []
        for first in range(0, len(openings), count):  # a story is compared with the others of its set
            prompts, index = openings[first : first + count], FIRST_INDEX + first * row.n
            sampling: dict[str, Any] = dict(max_new_tokens=CONFIG.max_new_tokens, temperature=row.temperature)
            with compute.autocast():
                candidates = generate(student, None, tokenizer, prompts * row.n, first_index=index, seed=0, **sampling)
                batch = ppo.collate(candidates[:count], compute.device)
                ref_logprobs, _ = ppo.read_reference(reference, batch, 1.0, CONFIG.micro_batch_size, states=False)
            kls.append(float(((batch.logprobs - ref_logprobs) * batch.mask).sum(1).mean()))
            grades = [grade.score for grade in grader.grade_each([(story.opening, story.text) for story in candidates])]
            values = (
                story_rewards(CONFIG, candidates, grades) if row.graded else [story.likelihood for story in candidates]
            )
            chosen = best_of_n(values, count)
            best, grades = [candidates[i] for i in chosen], [grades[i] for i in chosen]
            rewards += story_rewards(CONFIG, best, grades)
            stories, scores = stories + best, scores + grades
        texts = [story.text for story in stories[:CLUSTERED]]
        means = {
            "reward": mean(rewards),
            "kl": fmean(kls) + math.log(row.n) - (row.n - 1) / row.n,
            "score": 9 * mean(scores),
            "ended": fmean(story.ended == "eos" for story in stories),
            "words": fmean(story.words for story in stories),
            "distinct_4": distinct_ngrams(texts) or 0.0,
            "clusters": len(sizes := cluster_sizes(texts)),
            "largest": max(sizes),
        }
        measures |= {where + name: value for name, value in means.items()}
    reading: dict[str, Any] = {}
    if row.n == row.temperature == 1:
        unseen = Corpus(["unseen"], [("unseen", lambda: iter(unseen_stories(COREFERENCE)))])
        reading = coreference(student, tokenizer, unseen.documents()) | bits_per_byte(student, tokenizer, unseen)
    names = ("repeated_name", "introduced_name", "he_or_she", "bits_per_byte")
    return measures | {name: reading.get(name) for name in names}


def mean(values: Sequence[float | None]) -> float:
    """Of those that there are; nan of none."""
    return fmean([value for value in values if value is not None] or [math.nan])


if __name__ == "__main__":
    main()
