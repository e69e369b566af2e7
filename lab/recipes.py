"""Compare recipes of interaction with controls that need no teacher or no training: the tables of
lab/results.md.

python lab/recipes.py --seeds 1 2 3
python lab/recipes.py --seeds 1 2 3 --options "" "--lam 0.9" "shuffled: --grades 64 --steps 8"
python lab/recipes.py --seeds 1 2 3 --pretrain "--corpus tinystories.txt" --reader smollm2

Per seed, a student is pretrained with train_pretrain.py's defaults, or with --pretrain, then
trained by train_interact.py once per text of --options (default: the demo, and with the student's
likelihood or a constant as the score); a control of lab/controls.py can stand before a colon.
Finished runs are not repeated. The untouched and the trained students then write a story to each
held-out opening, which the built-in teacher grades; further controls are lower temperatures, and
the likeliest or best-rewarded of four stories. --reader adds their sense to a language model
(lab/reader.py). Who is who is measured on unseen stories of the grammar, or of a corpus without it.
Prints Markdown: means over the seeds, and the reward's standard error over the openings. Writes
OUT/rows.jsonl, with each seed's measures and each story's reward and sense, and OUT/reward.svg,
README's picture.
"""

import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from lab import controls, figures
from lab.coreference import coreference
from lab.figures import Bar
from lab.reader import Reader, mean_and_ci
from lab.runs import (
    corpus_of_teacher,
    folder_of,
    interact_config,
    pretrain_config,
    train,
    words_of,
)
from lab.second_judge import best_of_n
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.data.builtin import dull
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import prepare
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.intervals import mean_of, standard_error
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams
from tinystory.evaluate.validation import bits_per_byte
from tinystory.ops.compute import resolve
from tinystory.rl.reward import story_rewards
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import script_parser
from tinystory.run.records import Record
from tinystory.student import checkpoint
from tinystory.student.generate import Story, generate
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

CONFIG = InteractConfig()
FIRST_INDEX = 2 * 10**9  # of the measured stories: no run uses these random numbers
COREFERENCE = 300  # unseen stories
# of a record, which the table leaves out
NOT_SHOWN = ("name", "seed", "rewards", "senses")
# Measured on these; of a student itself, so not of a control.
UNSEEN = ("repeated_name", "he_or_she", "bits_per_byte")
CLUSTERED = 64  # stories for distinct_4 and clusters: means over groups of so many
TEMPERATURES = (0.7, 0.6, 0.5, 0.4)  # of the untouched student, as controls
OPENINGS = Openings(load_openings(CONFIG.openings), CONFIG.seed).held_out


class Row(NamedTuple):
    """A row of the table: how its stories are written and chosen."""

    name: str
    folder: Path
    temperature: float = 1.0
    n: int = 1  # stories per opening
    # one of the n: the first, the likeliest ("likelihood") or the best ("reward")
    chosen_by: str = "first"


class Arm(NamedTuple):
    """An interaction: a control of lab/controls.py, or "", and options."""

    control: str
    words: list[str]


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/recipes", help="folder of the runs")
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="of pretraining and interaction",
    )
    add(
        "--options",
        nargs="+",
        default=["", "--reward likelihood", "--reward constant"],
        metavar="TEXT",
        help="of train_interact.py, per run; CONTROL: TEXT for a control",
    )
    add("--pretrain", default="", metavar="TEXT", help="options of train_pretrain.py")
    add("--reader", default="", metavar="NAME", help="language model that reads the stories too")
    options = parser.parse_args(argv)
    out = folder_of(options.out)
    arms = {text: arm_of(text) for text in options.options}
    pretraining = words_of("--pretrain", options.pretrain)
    for seed in options.seeds:
        pretrain_config(["--seed", str(seed), *pretraining])
        for arm in arms.values():
            interact_config(["--seed", str(seed), *arm.words])
    reader = Reader(options.reader) if options.reader else None
    with locked(out):
        compare(out, options.seeds, pretraining, arms, reader)


def arm_of(text: str) -> Arm:
    control, rest = controls.split(text)
    return Arm(control, words_of("--options", rest))


def compare(
    out: Path,
    seeds: Sequence[int],
    pretraining: Sequence[str],
    arms: Mapping[str, Arm],
    reader: Reader | None,
) -> None:
    """Train and measure the students, and print and write the tables. pretraining: options. arms:
    each interaction, by its text."""
    records: list[Record] = []
    for seed in seeds:
        rows = train_students(out, seed, pretraining, arms)
        config = pretrain_config(["--seed", str(seed), *pretraining])
        unseen = unseen_texts(config)
        with open_grader(CONFIG, builtin_teacher, corpus=config.corpus) as grader:
            for row in rows:
                record = {"name": row.name, "seed": seed}
                record |= measure(row, grader, CONFIG, OPENINGS, reader, unseen)
                records.append(record)
                with open(out / "rows.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
    bars = print_table(records)
    title = "Reward of stories to held-out openings, with the standard error over openings"
    figure = figures.bar_chart(title, bars, "the demo")
    atomic_write(out / "reward.svg", figures.standalone(figure))


def train_students(
    out: Path, seed: int, pretraining: Sequence[str], arms: Mapping[str, Arm]
) -> list[Row]:
    """Finish a seed's runs, and return its rows. The first is the untouched student's."""
    start = out / f"pretrain-{seed}"
    options = ["--seed", str(seed), *pretraining]
    pretrained = pretrain_config(options)
    train(start, options, words=pretrained.words)
    rows = [
        Row("untouched", start, n=4),
        Row("likeliest of 4", start, n=4, chosen_by="likelihood"),
        Row("best of 4 by reward", start, n=4, chosen_by="reward"),
    ]
    for temperature in TEMPERATURES:
        rows.append(Row(f"temperature {temperature}", start, temperature))
    for text, arm in arms.items():
        name = "_".join(text.replace("--", "").replace(":", "").split()) or "default"
        run = out / f"{name}-{seed}"
        with controls.CONTROLS[arm.control]():
            argv = ["--init", str(start), "--seed", str(seed)]
            argv += corpus_of_teacher(pretrained, interact_config(arm.words))
            train(run, argv, arm.words)
        rows.append(Row(f"`{text}`" if text else "the demo", run))
    return rows


def print_table(records: Sequence[Record]) -> list[Bar]:
    """Print Markdown, and return each row's mean reward."""
    columns = [column for column in records[-1] if column not in NOT_SHOWN]
    print(f"| | {' | '.join(columns)} | standard error |")
    print("|---|" + "---|" * (len(columns) + 1))
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    bars = []
    for name, seeds in by_name.items():
        openings = []
        for rewards in zip(*(record["rewards"] for record in seeds), strict=True):
            mean = mean_of(rewards)
            if mean is not None:
                openings.append(mean)
        error = standard_error(openings)
        assert error is not None, "there are many openings"
        bars.append(Bar(name.strip("`"), fmean(openings), error))
        values = [mean_of(record[column] for record in seeds) for column in columns]
        values.append(error)
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} |")
    return bars


def load_student(folder: Path, device: torch.device) -> tuple[Student, Tokenizer]:
    """A run's newest student: `best` would be selected by score."""
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(folder) or folder, device)
    return student, tokenizer


@functools.lru_cache(1)  # rows that choose among the same stories follow each other
@torch.no_grad()
def written(
    folder: Path,
    temperature: float,
    openings: tuple[str, ...],
    max_new_tokens: int,
    device: str,
    grader: Grader,
) -> tuple[list[Story], list[float | None]]:
    """A story to each opening, and their scores."""
    compute = resolve(device, "auto")
    student, tokenizer = load_student(folder, compute.device)
    with compute.autocast():
        stories = generate(
            student,
            None,
            tokenizer,
            openings,
            first_index=FIRST_INDEX,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=0,
        )
    grades = grader.grade_each([(story.opening, story.text) for story in stories])
    return stories, [grade.score for grade in grades]


def measure(
    row: Row,
    grader: Grader,
    config: InteractConfig,
    openings: Sequence[str],
    reader: Reader | None = None,
    unseen: Sequence[str] = (),
) -> Record:
    """Measures of a row. A reward compares a story with the other chosen ones, one per opening.
    reader: adds their mean `sense`. unseen: texts for UNSEEN (default: stories of the grammar)."""
    prompts = tuple(openings) * row.n
    candidates, candidate_scores = written(
        row.folder, row.temperature, prompts, config.max_new_tokens, config.device, grader
    )
    chosen: Sequence[int] = range(len(openings))
    if row.chosen_by == "likelihood":
        # whether a story has an end, then its mean log-probability
        keys = [(story.ended == "eos", float(story.logprobs.mean())) for story in candidates]
        chosen = best_of_n(keys, len(openings))
    elif row.chosen_by == "reward":
        candidate_rewards = story_rewards(config, candidates, candidate_scores)
        chosen = best_of_n(candidate_rewards, len(openings))

    stories = [candidates[i] for i in chosen]
    scores = [candidate_scores[i] for i in chosen]
    rewards = story_rewards(config, stories, scores)
    score = mean_of(scores)
    texts = [story.text for story in stories]
    starts = range(0, max(len(texts) - CLUSTERED, 0) + 1, CLUSTERED)
    groups = [texts[start : start + CLUSTERED] for start in starts]
    sizes = [cluster_sizes(group) for group in groups]
    kinds = Counter(dull.kind_of(text) for text in texts)
    measures: Record = {"reward": mean_of(rewards), "score": None if score is None else 9 * score}
    for kind in dull.KINDS:
        measures[kind] = kinds[kind] / len(texts)
    measures |= {
        "ended": fmean(story.ended == "eos" for story in stories),
        "words": fmean(story.words for story in stories),
        "distinct_4": mean_of(distinct_ngrams(group) for group in groups),
        "clusters": fmean(map(len, sizes)),
        "largest": fmean(map(max, sizes)),
    }
    measures |= dict.fromkeys(UNSEEN)
    if row.chosen_by == "first" and row.temperature == 1:
        measures |= unseen_measures(row.folder, unseen or unseen_stories(COREFERENCE))
    if reader:
        senses = reader.sense([(story.opening, story.text) for story in stories])
        measures["sense"], _ = mean_and_ci(senses)
        measures["senses"] = [None if math.isnan(sense) else float(sense) for sense in senses]
    measures["rewards"] = rewards
    return measures


def unseen_texts(config: PretrainConfig) -> list[str]:
    """COREFERENCE texts on which a student was not trained: of the grammar if it has read some,
    else of its corpus's validation split."""
    if "builtin" in config.corpus:
        return unseen_stories(COREFERENCE)
    data = prepare(
        open_corpus(config.corpus),
        vocab_size=config.vocab_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    texts = []
    for first, end in pairwise(data.val.offsets[: COREFERENCE + 1].tolist()):
        texts.append(data.tokenizer.decode(data.val.tokens[first:end].tolist()))
    return texts


def unseen_measures(folder: Path, stories: Sequence[str]) -> Record:
    """The measures UNSEEN of a student."""
    student, tokenizer = load_student(folder, torch.device("cpu"))
    measures = coreference(student, tokenizer, stories) | bits_per_byte(student, tokenizer, stories)
    return {name: measures[name] for name in UNSEEN}


if __name__ == "__main__":
    main()
