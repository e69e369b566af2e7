"""report.html: a self-contained page about one run, without network access, scripts or other files.
It is written from the records in the run's folder alone, so it can be rewritten at any time; during
its run it is, and reloads itself."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from zlib import crc32

from tinystory.evaluate.stories import cluster_sizes, mean_of
from tinystory.report import page
from tinystory.report.before_after import BeforeAfter, from_start, read_before_after
from tinystory.report.charts import COLOURS, Line, chart, number
from tinystory.report.findings import findings_sections
from tinystory.report.page import TOP_SCORE, block, details, grid, section, story_card
from tinystory.run.collapse import CollapseDetector
from tinystory.run.folder import Record, read_config, read_metrics, read_stories
from tinystory.run.text import printable
from tinystory.run.trust import MARK

RANDOM, UNSCORED = 6, 3  # stories shown: random ones; unscored
HERO = (560, 300)  # size of the chart at the top, in pixels
RELOAD_S = 10  # while the run goes on
RECENT = 5  # steps from whose pace the time left is estimated
PARTS = ("rollout", "reference", "teacher", "update")  # stages of a step, in order

SAMENESS_CURVES = {
    "story_clusters": "Clusters of similar stories in a step",
    "diversity_mean": "Difference from the other stories, 0 to 1",
    "distinct_4": "Distinct 4-grams in a step’s stories",
    "ended": "Fraction of stories that end",
    "held_out_story_clusters": "Clusters in an evaluation",
}
STUDENT_CURVES = {
    "objective": "Objective: reward less the KL penalty",
    "kl": "KL to the initial student per story, nats",
    "kl_coef": "KL coefficient",
    "entropy": "Entropy per story, nats",
    "length_mean": "Story length, words",
    "reward_std": "Standard deviation of the reward in a step",
}
KEYS = "Keys of metrics.jsonl."
DIAGNOSTICS = "policy_loss value_loss explained_variance clip_fraction approx_kl grad_norm ratio_error".split()
# shown by their last value; the others by their sum
LATEST = ("words_in", "words_out", "teacher_cost")
SUMMED = (
    *(f"{part}_s" for part in PARTS),
    "unscored",
    "teacher_requests",
    "teacher_retries",
    "teacher_cached",
)
SUMMED += ("teacher_tokens_in", "teacher_tokens_out")
PRETRAINING_CURVES = {
    "val_bits_per_byte": "Validation, bits per byte",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}


@contextlib.contextmanager
def live_report(run: Path, writes: bool) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step, which keeps a run's report up to date. However
    the block ends, the page is written once more and no longer reloads itself. writes: False in all
    processes but one."""
    due = 0.0

    def update() -> None:
        nonlocal due
        if writes and (start := time.monotonic()) >= due:
            write_report(run, live=True)
            # at most a twentieth of the run's time
            due = start + max(RELOAD_S, 20 * (time.monotonic() - start))

    try:
        yield update
    finally:
        if writes:
            write_report(run)


def write_report(run_folder: Path, live: bool = False) -> Path:
    """Write report.html into a run's folder, finished or not, and return its path. live: the page
    reloads itself."""
    folder = Path(run_folder)
    metrics, config = read_metrics(folder), read_config(folder)
    if not metrics:
        sections = ['<p class="note">No step is recorded yet.</p>']
    elif "reward_mean" in metrics[-1]:
        sections = interaction(folder, metrics, config)
    else:
        sections = pretraining(metrics)
    if config:
        rest = [item for item in config.items() if item[0] not in ("options", MARK)]
        sections.append(
            details("How it was run", "", page.facts([*config["options"].items(), *rest]))
        )
    for step, sentence in CollapseDetector(
        metrics, number_option(config, "kl_target") or math.inf
    ).warnings.values():
        sections.insert(
            0, f'<p class="warning"><b>From step {number(step)}:</b> {escape(sentence)}</p>'
        )
    title, note = heading(folder, metrics, config)
    note += f" · {remaining(metrics, config)}" * live
    return page.write(folder / "report.html", title, note, sections, RELOAD_S * live)


def heading(folder: Path, metrics: list[Record], config: Record) -> tuple[str, str]:
    """The title (student, teacher, corpus) and the note (folder, step, device, start), as HTML."""
    student = config.get("options", {}).get("student")
    size, corpus = (
        (student.get("parameters"), student.get("corpus"))
        if isinstance(student, dict)
        else (None, None)
    )
    name = f"A student of {number(size)} parameters" if type(size) is int else "A student"
    read = (
        ", ".join(Path(str(key)).name for key in corpus) if isinstance(corpus, list) else "a corpus"
    )
    interacts = bool(metrics) and "reward_mean" in metrics[-1]
    stage = f"taught by {scorer(config) or 'scores'} after reading" if interacts else "reading"
    notes = [
        folder.resolve().name,
        *(page.count(record["step"], "step") for record in metrics[-1:]),
    ]
    if config:
        notes += [config["device"], f"{config['started'][:16].replace('T', ' ')} UTC"]
    return escape(f"{name}, {stage} {read}"), escape(" · ".join(notes))


def number_option(config: Record, name: str) -> float | None:
    value = config.get("options", {}).get(name)
    return value if type(value) in (int, float) else None


def remaining(metrics: list[Record], config: Record) -> str:
    """The state of an unfinished run, with the time left if the pace of its RECENT steps is
    known."""
    recent, last = metrics[-RECENT:], metrics[-1] if metrics else {}
    words, speed = last.get("words"), mean_of(column(recent, "tokens_per_s"))
    if "reward_mean" in last and (steps := number_option(config, "steps")):
        seconds = sum(record.get(f"{part}_s") or 0 for part in PARTS for record in recent)
        left = (steps - last["step"]) * seconds / len(recent)
    elif words and speed and (total := number_option(config, "words")):
        left = (total / words - 1) * (last.get("tokens") or 0) / speed
    else:
        return "running"
    return f"running, about {page.duration(left)} left"


# ---- an interaction run --------------------------------------------------------------------------


def scorer(config: Record) -> str:
    """The name of the model or callable that scored the stories; "" if it is not recorded."""
    options = config.get("options", {})
    teacher, scored_by = options.get("teacher"), options.get("scored_by")
    if isinstance(teacher, dict) and teacher.get("model"):
        return str(teacher["model"])
    return Path(scored_by).name if isinstance(scored_by, str) else ""


def verdict(config: Record) -> str:
    """The result of calibrating the scorer before the run, as a clause."""
    calibration = config.get("options", {}).get("calibration")
    return (
        str(calibration.get("verdict"))
        if isinstance(calibration, dict)
        else "was not calibrated before the run"
    )


def interaction(folder: Path, metrics: list[Record], config: Record) -> list[str]:
    first, last, unscored, criteria = digest(read_stories(folder))
    curves, by = from_start(folder, metrics), scorer(config)
    scores = []
    for name in criteria:
        line = curve(metrics, f"{name}_mean", name if name in COLOURS else "plain")
        scores.append(chart(printable(name.replace("_", " ").capitalize()), [line], (0, TOP_SCORE)))
    without = "The teacher returned no valid score for these, so they were left out of the update. The first ones:"
    return [
        first_screen(metrics, curves, read_before_after(folder)),
        sameness(curves, first, last),
        section(
            "Scores", escape(f"Scored by {by}. It {verdict(config)}.") if by else "", grid(scores)
        ),
        section("The student", "", grid(curve_charts(metrics, STUDENT_CURVES))),
        *findings_sections(folder),
        details(
            "Samples of the last step",
            "Drawn at random, whatever their reward.",
            cards(drawn(last)),
        ),
        details("Stories without a score", without, cards(unscored)),
        details(
            "PPO diagnostics", KEYS, grid(curve_charts(metrics, {key: key for key in DIAGNOSTICS}))
        ),
        details("Time, words and requests", KEYS, page.facts(totals(metrics))),
    ]


def cards(records: Iterable[Record]) -> str:
    return block(
        "cards", "".join(story_card(record, f"Step {number(record['step'])}") for record in records)
    )


def first_screen(
    metrics: list[Record], curves: list[Record], comparison: BeforeAfter | None
) -> str:
    lines = [
        curve(metrics, "reward_mean", "plain", name="training"),
        curve(curves, "held_out_reward", "reward", name="held out"),
    ]
    right = chart("Mean reward", lines, size=HERO)
    if comparison is None:
        return block("hero", f"<div>{right}</div>")
    rule, pairs = comparison.typical()
    names = [name.capitalize() for name in comparison.names]
    first, *more = [block("pair", "".join(map(story_card, pair, names))) for pair in pairs] or [""]
    others = details("The largest loss, and the quartiles of the gain", "", "".join(more))
    header, *rows = comparison.table()
    right += page.table(header, rows) + f'<p class="note">{escape(comparison.tellers())}</p>'
    left = (
        f'<b>{escape(comparison.conclusion())}</b><p class="note">{escape(rule)}</p>{first}{others}'
    )
    return block("hero", f"<div>{left}</div><div>{right}</div>")


def sameness(metrics: list[Record], first: list[Record], last: list[Record]) -> str:
    ends = [first] * (first is not last) + [last]
    steps = [
        (cluster_sizes([r["story"] for r in records]), records[0]["step"])
        for records in ends
        if records
    ]
    bars = "".join(page.cluster_bar(*step) for step in steps)
    return section(
        "Better stories, or one story again?",
        "A score can be bought by telling one good story over and over: then the difference falls as the score rises, "
        "the clusters become few and their blocks wide. Each block of a bar is a cluster of similar stories, as wide "
        "as it has stories; two stories are similar if they share more than 12 % of their phrases of three words, "
        "names aside.",
        bars + grid(curve_charts(metrics, SAMENESS_CURVES)),
    )


def totals(metrics: list[Record]) -> list[tuple[str, str]]:
    """The last value or the sum of each key of metrics.jsonl that is on record and not 0."""
    values = {key: column(metrics, key)[-1] for key in LATEST}
    values |= {key: sum(value or 0 for value in column(metrics, key)) for key in SUMMED}
    return [(key, number(value)) for key, value in values.items() if value]


def digest(
    stories: Iterable[Record],
) -> tuple[list[Record], list[Record], list[Record], tuple[str, ...]]:
    """The stories of the first and the last step (one list if they are the same), the first
    UNSCORED without a score, and the criteria. Only these are held in memory."""
    first, last, unscored = list[Record](), list[Record](), list[Record]()
    criteria: tuple[str, ...] = ()  # the last ones: a resume may bring another --teacher-prompt
    for _, step in groupby(stories, lambda record: record["step"]):
        last = [*step]
        first = first or last
        unscored += [record for record in last if record["reward"] is None][
            : UNSCORED - len(unscored)
        ]
        criteria = next(
            (tuple(record["scores"]) for record in reversed(last) if record["scores"]), criteria
        )
    return first, last, unscored, criteria


def drawn(stories: Iterable[Record]) -> list[Record]:
    """RANDOM stories, the same ones at each call."""
    return sorted(stories, key=lambda record: crc32(b"%d %d" % (record["step"], record["index"])))[
        :RANDOM
    ]


# ---- a pretraining run ---------------------------------------------------------------------------


def pretraining(metrics: list[Record]) -> list[str]:
    losses = [
        curve(metrics, "loss", x="words", name="train"),
        curve(metrics, "val_loss", "reward", x="words", name="val"),
    ]
    figure = chart("Loss, nats per token", losses, x_name="training words", size=HERO)
    rows = [(f"Training {name}", number(metrics[-1].get(name))) for name in ("words", "tokens")]
    drawings = curve_charts(metrics, PRETRAINING_CURVES, "words", "training words")
    return [
        block("hero", f"<div>{figure}</div><div>{page.facts(rows)}</div>"),
        section("Training", "", grid(drawings)),
    ]


# ---- columns of the metrics ----------------------------------------------------------------------


def column(metrics: list[Record], key: str) -> list[float | None]:
    """The numbers of a key; None for anything else, as a server may have sent."""
    return [value if type(value := record.get(key)) in (int, float) else None for record in metrics]


def curve(
    metrics: list[Record], key: str, colour: str = "plain", *, x: str = "step", name: str = ""
) -> Line:
    return Line(column(metrics, x), column(metrics, key), colour, name)


def curve_charts(
    metrics: list[Record], titles: dict[str, str], x: str = "step", x_name: str = "step"
) -> list[str]:
    return [
        chart(title, [curve(metrics, key, x=x)], x_name=x_name) for key, title in titles.items()
    ]
