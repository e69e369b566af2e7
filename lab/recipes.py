"""Compare recipes of interaction with controls that need no teacher or no training: the tables of
lab/results.md.

python lab/recipes.py --seeds 1 2 3
python lab/recipes.py --seeds 1 2 3 --options "" "--graded 128" "--lam 0.9"

Per seed, a student is pretrained with train_pretrain.py's defaults, then trained by
train_interact.py once per text of --options (default: the demo, and with the student's likelihood
or a constant as the score). Finished runs are not repeated. The untouched and the trained students
then write a story to each held-out opening, which the built-in teacher grades; further controls are
lower temperatures, and the likeliest or best-rewarded of four stories. Prints Markdown: means over
the seeds, and the reward's standard error over the openings. Writes OUT/rows.jsonl, with each
seed's measures and each story's reward, and OUT/reward.svg, README's picture.
"""

import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from lab import figures
from lab.coreference import coreference
from lab.runs import folder_of, interact_config, pretrain_config, train, words_of
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.data.builtin import dull
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.stories import best_of_n, cluster_sizes, distinct_ngrams, mean_of
from tinystory.evaluate.validation import bits_per_byte
from tinystory.ops.compute import resolve
from tinystory.rl.reward import story_rewards
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import script_parser
from tinystory.student import checkpoint
from tinystory.student.generate import Story, generate
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

CONFIG = InteractConfig()
FIRST_INDEX = 2 * 10**9  # of the measured stories: no run uses these random numbers
COREFERENCE = 300  # stories
# on them; of a student itself, so not of a control
UNSEEN = ("repeated_name", "he_or_she", "bits_per_byte")
CLUSTERED = 64  # stories for distinct_4 and clusters
OPENINGS = Openings(load_openings(CONFIG.openings), CONFIG.seed).held_out


class Row(NamedTuple):
    name: str
    folder: Path
    temperature: float = 1.0
    n: int = 1  # stories per opening
    # one of the n: the first, the likeliest ("likelihood") or the best ("reward")
    chosen_by: str = "first"


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", default="runs/recipes", help="folder of the runs")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="of pretraining and interaction",
    )
    controls = ["", "--reward likelihood", "--reward constant"]
    parser.add_argument(
        "--options",
        nargs="+",
        default=controls,
        metavar="TEXT",
        help="of train_interact.py, per run",
    )
    options = parser.parse_args(argv)
    out = folder_of(options.out)
    flags = {text: words_of("--options", text) for text in options.options}
    for seed in map(str, options.seeds):
        pretrain_config(["--seed", seed])
        for words in flags.values():
            interact_config(["--seed", seed, *words])
    with locked(out):
        compare(out, options.seeds, flags)


def compare(out: Path, seeds: Sequence[int], flags: Mapping[str, Sequence[str]]) -> None:
    """Train and measure the students, and print and write the tables. flags: the options of each
    interaction, by their text."""
    records: list[dict[str, Any]] = []
    for seed in seeds:
        start = out / f"pretrain-{seed}"
        train(start, ["--seed", str(seed)], words=PretrainConfig().words)
        by = {"first": "untouched", "likelihood": "likeliest of 4", "reward": "best of 4 by reward"}
        rows = [Row(name, start, n=4, chosen_by=choice) for choice, name in by.items()]
        rows += [Row(f"temperature {t}", start, t) for t in (0.7, 0.6, 0.5)]
        for text, words in flags.items():
            run = out / f"{'_'.join(text.replace('--', '').split()) or 'default'}-{seed}"
            train(run, ["--init", str(start), "--seed", str(seed)], words)
            rows.append(Row(f"`{text}`" if text else "the demo", run))
        corpus = checkpoint.load(checkpoint.find(start))[2]["corpus"]
        with open_grader(CONFIG, builtin_teacher, corpus=corpus) as grader:
            for row in rows:
                records.append(
                    {"name": row.name, "seed": seed} | measure(row, grader, CONFIG, OPENINGS)
                )
                with open(out / "rows.jsonl", "a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    columns = [column for column in records[-1] if column not in ("name", "seed", "rewards")]
    print(f"| | {' | '.join(columns)} | standard error |\n|---|{'---|' * (len(columns) + 1)}")
    bars = []
    for name in dict.fromkeys(record["name"] for record in records):
        same = [record for record in records if record["name"] == name]
        means = [mean_of(record[column] for record in same) for column in columns]
        openings = [
            x
            for x in map(mean_of, zip(*(record["rewards"] for record in same), strict=True))
            if x is not None
        ]
        standard_error = stdev(openings) / math.sqrt(len(openings))
        bars.append((name.strip("`"), fmean(openings), standard_error))
        cells = ["" if x is None else f"{x:.3f}" for x in [*means, standard_error]]
        print(f"| {name} | {' | '.join(cells)} |")
    title = "Reward of stories to held-out openings, with the standard error over openings"
    figure = figures.bars(title, bars, "the demo")
    atomic_write(out / "reward.svg", figures.standalone(figure))


@functools.lru_cache(1)
@torch.no_grad()
def written(
    folder: Path,
    temperature: float,
    openings: tuple[str, ...],
    max_new_tokens: int,
    device: str,
    grader: Grader,
) -> tuple[list[Story], list[float | None]]:
    """A story to each opening by a run's newest checkpoint (`best` would be selected by score), and
    their scores."""
    compute = resolve(device, "auto")
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(folder) or folder, compute.device)
    sampling: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=0)
    with compute.autocast():
        stories = generate(student, None, tokenizer, openings, first_index=FIRST_INDEX, **sampling)
    grades = grader.grade_each([(story.opening, story.text) for story in stories])
    return stories, [grade.score for grade in grades]


def measure(
    row: Row, grader: Grader, config: InteractConfig, openings: Sequence[str]
) -> dict[str, Any]:
    """Measures of a row. A reward compares a story with the other chosen ones, one per opening."""
    drawn = (*openings,) * row.n
    candidates, scores = written(
        row.folder, row.temperature, drawn, config.max_new_tokens, config.device, grader
    )
    values: dict[str, Sequence[Any]] = {
        "first": [-i for i in range(len(candidates))],
        "likelihood": [story.likelihood for story in candidates],
        "reward": story_rewards(config, candidates, scores) if row.chosen_by == "reward" else [],
    }
    chosen = best_of_n(values[row.chosen_by], len(openings))
    stories, scores = [candidates[i] for i in chosen], [scores[i] for i in chosen]
    texts = [story.text for story in stories]
    rewards, kinds = story_rewards(config, stories, scores), Counter(map(dull.kind_of, texts))
    sizes, score = cluster_sizes(texts[:CLUSTERED]), mean_of(scores)
    measures: dict[str, Any] = {
        "reward": mean_of(rewards),
        "score": None if score is None else 9 * score,
        **{kind: kinds[kind] / len(texts) for kind in dull.KINDS},
        "ended": fmean(story.ended == "eos" for story in stories),
        "words": fmean(story.words for story in stories),
        "distinct_4": distinct_ngrams(texts[:CLUSTERED]),
        "clusters": len(sizes),
        "largest": max(sizes),
        **dict.fromkeys(UNSEEN),
        "rewards": rewards,
    }
    if row.chosen_by == "first" and row.temperature == 1:
        student, tokenizer, _ = checkpoint.load(
            checkpoint.newest(row.folder) or row.folder, torch.device("cpu")
        )
        unseen = unseen_stories(COREFERENCE)
        reading = coreference(student, tokenizer, unseen) | bits_per_byte(
            student, tokenizer, unseen
        )
        measures |= {name: reading[name] for name in UNSEEN}
    return measures


if __name__ == "__main__":
    main()
