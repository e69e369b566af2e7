"""report.html: a self-contained page about one run, without network access, scripts or other files.

The page is written only from the records in the run's folder, so it can be rewritten at any time.
During the run it is rewritten regularly and reloads itself."""

import contextlib
import math
import random
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from tinystory.data.corpus import NO_STORIES
from tinystory.evaluate.held_out import evaluations_by_step
from tinystory.evaluate.intervals import standard_error
from tinystory.evaluate.stories import cluster_sizes
from tinystory.report import page
from tinystory.report.before_after import (
    doubt,
    followed,
    from_start,
    read_before_after,
    short_name,
    teaching,
)
from tinystory.report.charts import Line, Span, chart, number
from tinystory.report.commands import recorded_next_command
from tinystory.report.control import control_section
from tinystory.report.findings import findings_sections
from tinystory.report.page import block, details, grid, section, story_card
from tinystory.run.collapse import CollapseDetector
from tinystory.run.folder import read_config
from tinystory.run.records import (
    EVALUATIONS,
    Record,
    column,
    read_metrics,
    read_records,
    read_stories,
    total,
)
from tinystory.run.text import printable
from tinystory.teacher.prompt import TOP

RANDOM = 6  # stories shown
HARDLY = 1.25  # a curve needs no chart up to this ratio of its highest to its lowest value
HERO = (560, 300)  # size of the chart at the top, in pixels
RELOAD_S = 10  # while the run goes on

SAMENESS_CURVES = {
    "story_clusters": "Clusters of similar stories in a step",
    "diversity_mean": "Difference from the step’s other stories, 0 to 1",
    "distinct_4": "Distinct 4-grams in a step’s stories",
    "ended": "Fraction of stories that end",
    "held_out_story_clusters": "Clusters in an evaluation",
}
STUDENT_CURVES = {
    "objective": "Objective: reward minus the KL penalty",
    "kl": "KL to the initial student per story, nats",
    "kl_coef": "KL coefficient",
    "entropy": "Entropy per story, nats",
    "length_mean": "Story length, words",
    "reward_std": "Standard deviation of the reward in a step",
}
SAMPLES_NOTE = (
    "These stories are drawn at random, whatever their reward. The reward is (score × (1 - diversity + diversity × "
    "difference) + length_weight × min(words / length_words, 1)) / (1 + length_weight), where the score is divided "
    "by its maximum, and the options have the values under “Options”. A story that is cut off keeps the fraction "
    "“unfinished” of the reward."
)
FOLLOWED_NOTE = (
    "These stories are for the last held-out opening without an empty story; the opening was not chosen by how good "
    "the stories are. At every evaluation the student samples with the same random numbers. Between the first and the "
    "last evaluation, a story that is similar to the one before it is left out."
)
BARS_NOTE = "Bars are one standard error over an evaluation’s stories."
CURVES_NOTE = (
    "Do not compare the training curve with the held-out curve: the diversity term of the reward is larger in an "
    "evaluation, which has few stories, than in a training step, which has many."
)
NEXT_NOTE = (
    "All stories are in stories.jsonl beside this page, and all evaluations in evaluations.jsonl."
)
NEXT_PRETRAINING_NOTE = (
    "To continue a stopped run, use the command with --resume that it printed last."
)
PAUSE_NOTE = (
    "In the middle of pretraining, the student does not read the corpus “dull” (filler text), and at the end it reads "
    "it again. The validation set always contains this text, so the validation loss stays high in the middle and falls "
    "steeply when the text comes back."
)
TOTALS_NOTE = "These are keys of metrics.jsonl, which also holds PPO’s diagnostics of every step."
# keys with their last value among the totals; the other keys have their sum
LATEST = ("words_in", "words_out", "teacher_cost", "kl_coef")
SUMMED = (
    "rollout_s reference_s teacher_s update_s unscored teacher_requests teacher_retries teacher_cached "
    "teacher_tokens_in teacher_tokens_out"
).split()
PRETRAINING_CURVES = {
    "val_bits_per_byte": "Validation, bits per byte",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}


@contextlib.contextmanager
def live_report(run: Path, writes: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that updates a run's report; call it after every step. When the block ends,
    in whatever way, the page is written once more and no longer reloads itself. writes: False in
    all processes except one."""
    due = 0.0

    def update() -> None:
        nonlocal due
        start = time.monotonic()
        if writes and start >= due:
            write_report(run, live=True)
            seconds = time.monotonic() - start
            due = start + max(RELOAD_S, 20 * seconds)  # at most a twentieth of the run's time

    try:
        yield update
    finally:
        if writes and run.is_dir():  # it may have been moved
            write_report(run)


def write_report(run: Path, live: bool = False) -> Path:
    """The path of report.html, which is written into the folder of a finished or unfinished run.
    live: the page reloads itself."""
    metrics = read_metrics(run)
    config = read_config(run)
    target = number_option(config, "kl_target") or math.inf
    sections: list[str] = []
    detector = CollapseDetector(from_start(run, metrics), target)
    for step, sentence in detector.warnings.values():
        warning = f"<b>From step {number(step)}:</b> {escape(sentence)}"
        sections.insert(0, f'<p class="warning">{warning}</p>')
    if not metrics:
        sections.append(page.note("No step is recorded yet."))
    elif is_interaction(metrics):
        sections += interaction(run, metrics, config)
    else:
        sections += pretraining(run, metrics, config)
    notes = [run.resolve().name]
    if metrics:
        notes.append(page.count(metrics[-1]["step"], "step"))
    if config:
        rest = [(name, value) for name, value in config.items() if name != "options"]
        facts = page.facts([*config["options"].items(), *rest])
        sections.append(details("Options", "", facts))
        minute = config["started"][:16].replace("T", " ")
        notes += [config["device"], f"{minute} UTC"]
    if live:
        notes.append("running")
    title = page.clip(heading(metrics, config))
    note = page.clip(" · ".join(notes))
    return page.write(run / "report.html", title, note, sections, RELOAD_S if live else 0)


def is_interaction(metrics: list[Record]) -> bool:
    return bool(metrics) and "reward_mean" in metrics[-1]


def heading(metrics: list[Record], config: Record) -> str:
    """The page's title, with student, teacher and corpus."""
    match config.get("options", {}).get("student"):
        case {"parameters": int(size), "corpus": list(corpus)}:
            name = f"A student of {number(size)} parameters"
            read = ", ".join(Path(str(part)).name for part in corpus)
        case _:
            name = "A student"
            read = "a corpus"
    if is_interaction(metrics):
        return f"{name}, pretrained on {read} and taught by {scorer(config) or 'scores'}"
    return f"{name}, pretrained on {read}"


def number_option(config: Record, name: str) -> float | None:
    value = config.get("options", {}).get(name)
    return value if type(value) in (int, float) else None


# ---- an interaction run --------------------------------------------------------------------------


def scorer(config: Record) -> str:
    """The name of the model or callable that scored the stories; "" if it is not recorded."""
    options = config.get("options", {})
    match options.get("taught_by"):
        case [{"model": str(_)}, _, *_] as models:
            return ", then ".join(short_name(str(each.get("model"))) for each in models)
    teacher = options.get("teacher")
    if isinstance(teacher, dict) and teacher.get("model"):
        return short_name(str(teacher["model"]))
    scored_by = options.get("scored_by")
    return Path(scored_by).name if isinstance(scored_by, str) else ""


def verdict(config: Record) -> str:
    """The result of calibrating the scorer before the run, as a clause without a subject."""
    calibration = config.get("options", {}).get("calibration")
    if not isinstance(calibration, dict):
        return "was not calibrated before the run"
    return str(calibration.get("verdict"))


def interaction(run: Path, metrics: list[Record], config: Record) -> list[str]:
    curves = from_start(run, metrics)
    steps = first_and_last(read_stories(run))
    criteria = {}
    for record in steps[-1] if steps else ():
        for name in record["scores"] or ():
            criteria[f"{name}_mean"] = printable(name.replace("_", " ").capitalize())
    name = scorer(config)
    scored_by = f"The scores are by {name}. This scorer {verdict(config)}." if name else ""
    return [
        first_screen(run, metrics, curves),
        control_section(run, metrics[-1]["step"]),
        section("One opening during interaction", FOLLOWED_NOTE, cards(followed(run))),
        sameness(curves, steps),
        section("Scores", page.clip(scored_by), curve_charts(metrics, criteria, y_range=(0, TOP))),
        section("The student", "", curve_charts(metrics, student_curves(metrics))),
        *findings_sections(run),
        details("Samples of the last step", SAMPLES_NOTE, cards(drawn(steps))),
        details("Time, words and requests", TOTALS_NOTE, page.facts(totals(metrics))),
        section("What next", NEXT_NOTE, next_commands(run)),
    ]


def student_curves(metrics: list[Record]) -> dict[str, str]:
    """STUDENT_CURVES, without the KL coefficient if it hardly changed; its last value is among the
    totals."""
    values = [value for value in column(metrics, "kl_coef") if value is not None]
    if values and max(values) <= HARDLY * min(values):
        return {key: title for key, title in STUDENT_CURVES.items() if key != "kl_coef"}
    return STUDENT_CURVES


def next_commands(run: Path, interaction: str = "") -> str:
    """A table of commands. interaction: the command for an interaction, after a pretraining."""
    folder = shlex.quote(str(run))
    commands = {"interaction": interaction} if interaction else {}
    commands |= {
        "more stories": f"python scripts/sample.py {folder}",
        "evaluation": f"python scripts/evaluate.py {folder} --stories 200",
        "export to transformers and llama.cpp": f"python scripts/export_hf.py {folder} OUT --gguf OUT.gguf",
    }
    return page.definitions((name, page.command(text)) for name, text in commands.items())


def cards(records: Iterable[Record]) -> str:
    articles = [story_card(record, f"Step {number(record['step'])}") for record in records]
    return block("cards", "".join(articles))


def first_screen(run: Path, metrics: list[Record], curves: list[Record]) -> str:
    evaluations = evaluations_by_step(run)
    errors = []
    for record in curves:
        evaluated = evaluations.get(record["step"], ())
        errors.append(standard_error(story["reward"] for story in evaluated))
    training = curve(metrics, "reward_mean", name="training")
    held_out = curve(curves, "held_out_reward", "reward", name="held out")
    held_out.errors = errors
    figure = chart("Mean reward, 0 to 1", [training, held_out], size=HERO)
    notes = [BARS_NOTE] if any(errors) else []
    if training.points().size and held_out.points().size:
        notes.append(CURVES_NOTE)
    figure += page.note(*notes)
    judge = curve(curves, "held_out_judge", "creativity")
    if judge.points().size:
        figure += chart("Mean score by the second judge, 0 to 1", [judge], size=HERO)
    comparison = read_before_after(run)
    if comparison is None:
        return block("hero", f"<div>{figure}</div>")

    rule, pair = comparison.typical()
    titles = [name.capitalize() for name in comparison.names]
    conclusion = comparison.conclusion()
    stories = f"<b>{escape(conclusion)}</b>" if conclusion else ""
    warning = doubt(read_config(run))
    if warning:
        stories += f'<p class="warning">{escape(warning)}</p>'
    taught = escape(teaching(read_config(run), metrics))
    stories += page.note(taught, escape(comparison.best_student()), escape(rule))
    stories += block("pair", "".join(map(story_card, pair, titles)))
    header, *rows = comparison.table()
    means = page.table(header, rows)
    styles = page.note(escape(comparison.styles()))
    return block("hero", f"<div>{stories}</div><div>{figure}{means}{styles}</div>")


def sameness(metrics: list[Record], steps: Sequence[list[Record]]) -> str:
    bars = ""
    for records in steps:
        sizes = cluster_sizes([record["story"] for record in records])
        clusters = page.count(len(sizes), "cluster")
        caption = (
            f"Step {number(records[0]['step'])}: {clusters} in {page.count(len(records), 'story', 'stories')}, "
            f"the largest of {sizes[0]}"
        )
        blocks = "".join(f'<i style="flex-grow: {size}"></i>' for size in sizes)
        bars += block("clusters", f"<small>{caption}</small>{block('parts', blocks)}")
    return section(
        "Diversity and mode collapse",
        "A student can raise its score by telling one good story over and over (mode collapse). Then the difference "
        "falls while the score rises, and there are few clusters with wide blocks. Each block of a bar is a cluster of "
        "similar stories, and its width is the number of stories. Two stories are similar if they share more than 12 % "
        "of their three-word phrases, ignoring names.",
        bars + curve_charts(metrics, SAMENESS_CURVES),
    )


def totals(metrics: list[Record]) -> list[tuple[str, str]]:
    """Names and values of LATEST (the last value) and SUMMED (the sum), without values that are 0
    or not recorded."""
    rows = []
    for key in (*LATEST, *SUMMED):
        value = column(metrics, key)[-1] if key in LATEST else total(metrics, key)
        if value:
            rows.append((key, number(value)))
    return rows


def first_and_last(stories: Iterable[Record]) -> list[list[Record]]:
    """The stories of the first step and of the last. (The stories of a whole run would need too
    much memory.)"""
    steps: list[list[Record]] = []
    for _, records in groupby(stories, lambda record: record["step"]):
        del steps[1:]
        steps.append(list(records))
    return steps


def drawn(steps: Sequence[list[Record]]) -> list[Record]:
    """RANDOM stories of the last step, drawn at random but the same at each call."""
    if not steps:
        return []
    stories = steps[-1]
    return random.Random(stories[0]["step"]).sample(stories, min(RANDOM, len(stories)))


# ---- a pretraining run ---------------------------------------------------------------------------


def pretraining(run: Path, metrics: list[Record], config: Record) -> list[str]:
    losses = [
        curve(metrics, "loss", x="words", name="train"),
        curve(metrics, "val_loss", "reward", x="words", name="val"),
    ]
    figure = chart("Loss, nats per token", losses, x_name="training words", size=HERO)
    if pauses(config):
        figure += page.note(PAUSE_NOTE)
    rows = [(f"Training {name}", number(metrics[-1].get(name))) for name in ("words", "tokens")]
    stories = spread(read_records(run / EVALUATIONS))
    next_command = recorded_next_command(run, config)
    newest = cards(stories[-1:])
    return [
        block("hero", f"<div>{figure}</div><div>{newest}{page.facts(rows)}</div>"),
        section(
            "The same story during pretraining",
            "At every validation the student continues the same opening, with the same random "
            "numbers. Each story shown is from at least twice the step of the story before it.",
            cards(stories[:-1]),
        ),
        section(
            "Training", "", curve_charts(metrics, PRETRAINING_CURVES, "words", "training words")
        ),
        section("What next", NEXT_PRETRAINING_NOTE, next_commands(run, next_command)),
    ]


def pauses(config: Record) -> bool:
    """Whether pretraining leaves a part of the corpus out for a while."""
    match config.get("options", {}).get("corpus"):
        case [*names]:
            paused = [name for name in names if name in NO_STORIES]
            return 0 < len(paused) < len(names)
    return False


def spread(stories: Iterable[Record]) -> list[Record]:
    """The first story, then stories from at least twice the step of the one before, and the last
    story. Rewards are removed, because nothing scores these stories."""
    shown: list[Record] = []
    for story in stories:
        del story["reward"]
        if len(shown) > 1 and shown[-1]["step"] < 2 * shown[-2]["step"]:
            shown.pop()  # it was the last
        shown.append(story)
    return shown


# ---- columns of the metrics ----------------------------------------------------------------------


def curve(
    metrics: list[Record], key: str, colour: str = "plain", x: str = "step", name: str = ""
) -> Line:
    return Line(column(metrics, x), column(metrics, key), colour, name)


def curve_charts(
    metrics: list[Record],
    titles: dict[str, str],
    x: str = "step",
    x_name: str = "step",
    y_range: Span | None = None,
) -> str:
    return grid(
        chart(title, [curve(metrics, key, x=x)], y_range, x_name) for key, title in titles.items()
    )
