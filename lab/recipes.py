"""Compare interaction recipes with controls that need no teacher or no training. This gives the
tables of lab/results/demo.md.

python lab/recipes.py --seeds 1 2 3
python lab/recipes.py --seeds 1 2 3 --options "" "--lam 0.9" "shuffled: --grades 64 --steps 8"
python lab/recipes.py --seeds 1 2 3 --pretrain "--corpus tinystories.txt" --reader smollm2

For each seed, a student is pretrained with train_pretrain.py's defaults, or with --pretrain. Then
train_interact.py trains it once for each text of --options (default: the demo, and the demo with
the student's likelihood or a constant as the score). A control (train_interact.py --control) or a
change of lab/controls.py can precede the options, separated by a colon. `mean: TEXT` averages the
weights of that run and of a second run, which has the seed plus 100. Finished runs and measured
rows are not repeated.

Each student, before and after interaction, then writes a story for each held-out opening, and the
built-in teacher grades the stories. Further controls before interaction are lower temperatures, and
the best of four stories by log-likelihood or by reward.
--reader adds a language model's coherence score of the first five sentences (lab/reader.py).
Coreference is measured on unseen stories of the grammar or, for a student of another corpus, on its
validation split.

The command prints Markdown: means over the seeds, and the reward's standard error over the
openings. It writes OUT/recipes.json (every number of the table), OUT/rows.jsonl (each seed's
measures, and each story's reward and coherence) and OUT/reward.svg, README's picture. To measure
with other options, delete OUT/rows.jsonl."""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from lab import controls, figures
from lab.coreference import coreference
from lab.figures import Bar
from lab.reader import Reader, mean_and_bootstrap_ci
from lab.runs import (
    EXPERIMENT,
    corpus_of_teacher,
    folder_of,
    interact_config,
    judges_in,
    pretrain_config,
    require_same,
    train,
    train_controls,
    words_of,
)
from lab.second_judge import best_of_n
from scripts import average
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.control import CONTROLS
from tinystory.config.interaction import REWARDS
from tinystory.config.record import given_again
from tinystory.data.builtin import dull
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings, names_file
from tinystory.data.shards import held_out_documents
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.corruptions import split_sentences, unseen_stories
from tinystory.evaluate.intervals import mean_of, standard_error
from tinystory.evaluate.open_grader import open_grader
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams
from tinystory.evaluate.validation import best_temperature_bits, bits_per_byte
from tinystory.ops.compute import resolve
from tinystory.rl.reward import differences, story_rewards
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import script_parser
from tinystory.run.records import Record, read_records
from tinystory.student import checkpoint
from tinystory.student.generate import Story, generate
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader

CONFIG = InteractConfig()
FIRST_INDEX = 2 * 10**9  # index of the first measured story: no run uses these random numbers
SECOND = 100  # added to the seed of a second interaction of the same student
COREFERENCE = 300  # number of unseen stories for coreference
# fields of a record that the table leaves out
NOT_SHOWN = ("name", "seed", "rewards", "coherences")
# Measures on the unseen stories, at the row's temperature. bits_per_byte is of a stream of stories,
# cut at the context. best_bits is of whole stories at the student's own best temperature, so it is
# lower. Rows that choose among stories have none.
UNSEEN = ("repeated_name", "he_or_she", "bits_per_byte", "best_bits")
SENTENCES = 5  # sentences of a story whose coherence is measured
CLUSTERED = 64  # distinct_4 and clusters are means over groups of this many stories
# names of rows in the figure; other rows have their options as names
PLAIN_NAMES = {
    "the demo": "PPO, the demo: 1 536 grades",
    "--grades 64 --steps 8 --eval-every 0": "PPO, 64 grades in 8 steps",
    "shuffled: ": "PPO, the demo's scores in random order",
    "--reward likelihood": "PPO, own likelihood as the score",
    "--reward constant": "PPO, every score equal",
}
TEMPERATURES = (0.7, 0.6, 0.5, 0.4)  # controls: temperatures of the student before interaction
OPENINGS = Openings(load_openings(CONFIG.openings), CONFIG.seed).held_out


class Row(NamedTuple):
    """A row of the table, with the settings by which its stories are sampled and chosen."""

    name: str
    folder: Path
    temperature: float = 1.0
    n: int = 1  # stories per opening
    # which of the n stories is chosen: the first, the first with an end ("ended"), the likeliest
    # ("likelihood") or the best ("reward")
    chosen_by: str = "first"


class Arm(NamedTuple):
    """An interaction. control: one of CONTROLS or of lab/controls.py's names, or "". options: of
    train_interact.py, as one text; words: the same as arguments."""

    control: str
    options: str
    words: list[str]


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/recipes", help="folder for the runs")
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="seeds of pretraining and interaction",
    )
    add(
        "--options",
        nargs="+",
        default=["", "--reward likelihood", "--reward constant"],
        metavar="TEXT",
        help="options of train_interact.py, one text per run; CONTROL: TEXT for a control, "
        "mean: TEXT for the mean of two runs",
    )
    add("--pretrain", default="", metavar="TEXT", help="options of train_pretrain.py")
    add("--reader", default="", metavar="NAME", help="language model that judges the stories too")
    options = parser.parse_args(argv)
    out = folder_of(options.out)
    arms = {text: arm_of(text) for text in options.options}
    pretraining = words_of("--pretrain", options.pretrain)
    for seed in options.seeds:
        pretrain_config(["--seed", str(seed), *pretraining])
        for arm in arms.values():
            interact_config(["--seed", str(seed), *arm.words])
    reader = Reader(options.reader) if options.reader else None
    settings = {"pretrain": options.pretrain, "reader": options.reader}
    with locked(out):
        require_same(out / EXPERIMENT, settings | judges_in(options.options))
        records = compare(out, options.seeds, pretraining, arms, reader)
    rows = table(records)
    print_table(rows)
    atomic_write(out / "recipes.json", json.dumps(rows, indent=1) + "\n")
    atomic_write(out / "reward.svg", draw(rows))


def arm_of(text: str) -> Arm:
    """The interaction of a text of --options. Raises UserError for options that it cannot have."""
    control, options = controls.split(text)
    words = words_of("--options", options)
    if control == controls.MEAN and "seed" in interact_config(words).given:
        raise UserError(
            f"--options {text!r}: the runs of a mean have seeds of their own: leave --seed out"
        )
    return Arm(control, options, words)


def compare(
    out: Path,
    seeds: Sequence[int],
    pretraining: Sequence[str],
    arms: Mapping[str, Arm],
    reader: Reader | None,
) -> list[Record]:
    """The measures of each row for each seed, after training the students. Adds new measures to
    OUT/rows.jsonl. pretraining: options of pretraining. arms: interactions by their texts."""
    path = out / "rows.jsonl"
    records: list[Record] = []
    for seed in seeds:
        rows = train_students(out, seed, pretraining, arms, TEMPERATURES)
        config = pretrain_config(["--seed", str(seed), *pretraining])
        unseen = unseen_texts(config)
        with open_grader(CONFIG, corpus=config.corpus) as grader:
            for row in rows:
                measure_row = partial(measure, row, grader, CONFIG, OPENINGS, reader, unseen)
                records.append(measured(path, row.name, seed, measure_row))
    return records


def measured(path: Path, name: str, seed: int, measure_row: Callable[[], Record]) -> Record:
    """The measures of a row for a seed: those in the file, or else measured now and added to the
    file."""
    for record in read_records(path):
        if (record["name"], record["seed"]) == (name, seed):
            return record
    record = {"name": name, "seed": seed} | measure_row()
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def train_students(
    out: Path,
    seed: int,
    pretraining: Sequence[str],
    arms: Mapping[str, Arm],
    temperatures: Sequence[float],
) -> list[Row]:
    """The rows of a seed, after finishing the seed's runs. The first row is the student before
    interaction."""
    start = out / f"pretrain-{seed}"
    options = ["--seed", str(seed), *pretraining]
    pretrained = pretrain_config(options)
    train(start, options, words=pretrained.words)
    rows = [
        Row("before interaction", start, n=4),
        Row("before, best of 4 by likelihood", start, n=4, chosen_by="likelihood"),
        Row("before, best of 4 by reward", start, n=4, chosen_by="reward"),
    ]
    for temperature in temperatures:
        rows.append(Row(f"before, temperature {temperature}", start, temperature))
    for text, arm in arms.items():
        follows_a_run = arm.control in (*CONTROLS, controls.MEAN)
        named_by = arm.options if follows_a_run else text
        name = "_".join(named_by.replace("--", "").replace(":", "").replace("/", "_").split())
        run = out / f"{name or 'default'}-{seed}"
        config = interact_config(arm.words)
        argv = ["--init", str(start), *corpus_of_teacher(pretrained, config)]
        with controls.CHANGES["" if follows_a_run else arm.control]():
            train(run, [*argv, "--seed", str(seed)], arm.words)
        if arm.control in CONTROLS:
            run = train_controls(run, arm.control, again_for_control(pretrained, config))
        if arm.control == controls.MEAN:
            run = train_mean(run, [*argv, "--seed", str(seed + SECOND)], arm.words)
        rows.append(Row(f"`{text}`" if text else "the demo", run))
    return rows


def train_mean(run: Path, argv: Sequence[str], words: Sequence[str]) -> Path:
    """The checkpoint with the mean of the weights of a finished run and of a second run, after
    finishing the second. argv, words: see `train`."""
    second = run.with_name(f"{run.name}-second")
    newest = [checkpoint.newest(run), train(second, argv, words)]
    mean = run.with_name(f"{run.name}-mean")
    if not mean.exists():
        average.main([*map(str, newest), str(mean)])
    return mean


def again_for_control(pretraining: PretrainConfig, interaction: InteractConfig) -> list[str]:
    """The options of a control that no record may give: files of the corpus, if the rubric is fitted
    to them, and a file of openings."""
    again = [] if interaction.reward in REWARDS else given_again(pretraining)
    if names_file(interaction.openings):
        again += ["--openings", interaction.openings]
    return again


def table(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The means over the seeds by row and measure, each row's "standard_error" of the reward over
    the openings, and its reward of each seed, "reward_by_seed"."""
    columns = [column for column in records[-1] if column not in NOT_SHOWN]
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    rows: dict[str, dict[str, Any]] = {}
    for name, seeds in by_name.items():
        by_opening = zip(*(seed["rewards"] for seed in seeds), strict=True)
        rewards = [mean for opening in by_opening if (mean := mean_of(opening)) is not None]
        error = standard_error(rewards)
        assert error is not None, "there are many openings"
        rows[name] = {column: mean_of(seed[column] for seed in seeds) for column in columns}
        rows[name]["standard_error"] = error
        rows[name]["reward_by_seed"] = [seed["reward"] for seed in seeds]
    return rows


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the rows as Markdown."""
    columns = [column for column in next(iter(rows.values())) if column != "reward_by_seed"]
    print(f"| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        cells = ["" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """README's picture, an SVG: the mean reward of each row."""
    bars = []
    for name, row in rows.items():
        options = name.strip("`")
        bars.append(Bar(PLAIN_NAMES.get(options, options), row["reward"], row["standard_error"]))
    title = "Mean reward, 0 to 1, for held-out openings (± standard error over openings)"
    return figures.standalone(figures.bar_chart(title, bars, PLAIN_NAMES["the demo"]))


def load_student(folder: Path, device: torch.device) -> tuple[Student, Tokenizer]:
    """The newest student of a run. (`best` would be selected by its score.)"""
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(folder) or folder, device)
    return student, tokenizer


@lru_cache(1)  # rows that choose among the same stories follow each other
@torch.no_grad()
def written(
    folder: Path,
    temperature: float,
    openings: tuple[str, ...],
    max_new_tokens: int,
    device: str,
    grader: Grader,
) -> tuple[list[Story], list[float | None]]:
    """A story for each opening, and the stories' scores."""
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
    rubric: Grader | None = None,
) -> Record:
    """The measures of a row. A reward compares a story with the other chosen stories, one per
    opening. grader: chooses the stories. rubric: scores the chosen ones (default: the grader).
    reader: adds the mean `coherence` of the stories' first sentences. unseen: texts for UNSEEN
    (default: stories of the grammar)."""
    prompts = tuple(openings) * row.n
    candidates, candidate_scores = written(
        row.folder, row.temperature, prompts, config.max_new_tokens, config.device, grader
    )
    chosen: Sequence[int] = range(len(openings))
    if row.chosen_by == "likelihood":
        # whether a story has an end, then its mean log-probability
        keys = [(story.ended == "eos", float(story.logprobs.mean())) for story in candidates]
        chosen = best_of_n(keys, len(openings))
    elif row.chosen_by == "ended":
        chosen = best_of_n([story.ended == "eos" for story in candidates], len(openings))
    elif row.chosen_by == "reward":
        among_candidates = differences([story.text for story in candidates])
        candidate_rewards = story_rewards(config, candidates, candidate_scores, among_candidates)
        chosen = best_of_n(candidate_rewards, len(openings))

    stories = [candidates[i] for i in chosen]
    scores = [candidate_scores[i] for i in chosen]
    texts = [story.text for story in stories]
    if rubric:
        grades = rubric.grade_each([(story.opening, story.text) for story in stories])
        scores = [grade.score for grade in grades]
    rewards = story_rewards(config, stories, scores, differences(texts))
    score = mean_of(scores)
    starts = range(0, max(len(texts) - CLUSTERED, 0) + 1, CLUSTERED)
    groups = [texts[start : start + CLUSTERED] for start in starts]
    sizes = [cluster_sizes(group) for group in groups]
    styles = Counter(dull.style_of(text) for text in texts)
    measures: Record = {"reward": mean_of(rewards), "score": None if score is None else 9 * score}
    for style in dull.STYLES:
        measures[style] = styles[style] / len(texts)
    measures |= {
        "ended": fmean(story.ended == "eos" for story in stories),
        "words": fmean(story.words for story in stories),
        "distinct_4": mean_of(distinct_ngrams(group) for group in groups),
        "clusters": fmean(map(len, sizes)),
        "largest": fmean(map(max, sizes)),
    }
    measures |= dict.fromkeys(UNSEEN)
    if row.chosen_by == "first":
        documents = unseen or unseen_stories(COREFERENCE)
        measures |= unseen_measures(row.folder, row.temperature, documents)
    if reader:
        coherences = reader.coherence([(story.opening, beginning(story.text)) for story in stories])
        measures["coherence"], _ = mean_and_bootstrap_ci(coherences)
        measures["coherences"] = [
            None if math.isnan(coherence) else float(coherence) for coherence in coherences
        ]
    measures["rewards"] = rewards
    return measures


def beginning(text: str) -> str:
    """The first sentences of a story, so that its length has no influence on its coherence."""
    return " ".join(split_sentences(text)[:SENTENCES])


def unseen_texts(config: PretrainConfig) -> list[str]:
    """COREFERENCE texts on which a student was not trained: new stories of the grammar if the
    student was trained on the grammar, otherwise texts of the corpus's validation split."""
    if "builtin" in config.corpus:
        return unseen_stories(COREFERENCE)
    corpus = open_corpus(config.corpus)
    documents = held_out_documents(corpus, config.val_fraction, config.seed)
    return [*islice(documents, COREFERENCE)]


def unseen_measures(folder: Path, temperature: float, stories: Sequence[str]) -> Record:
    """The measures UNSEEN of a student with a temperature folded in, as an interaction folds its
    temperature into the student that it starts from."""
    student, tokenizer = load_student(folder, torch.device("cpu"))
    student.divide_logits(temperature)
    measures: Record = coreference(student, tokenizer, stories)
    measures |= bits_per_byte(student, tokenizer, stories)
    _, best_bits = best_temperature_bits(student, tokenizer, stories)
    measures["best_bits"] = fmean(best_bits)
    return {name: measures[name] for name in UNSEEN}


if __name__ == "__main__":
    main()
