"""report.html: one page about one run that needs nothing else, no network, no script, no other file.

It is made from the records in the run's folder alone, so it can be written again at any time.
"""

import datetime
import hashlib
import heapq
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tinystory.errors import UserError
from tinystory.report import page, plots
from tinystory.report.page import CRITERIA, TOP_SCORE, colour, details, grid, section, story_card, tile
from tinystory.report.plots import Line, chart, number
from tinystory.runlog import SAMPLES, atomic_write, read_config, read_metrics, read_records, read_stories

EDGE = 5  # the headline compares this many first steps with as many last ones
PAIRS, PICKED, UNSCORED = 12, 5, 3  # how many before-and-after pairs, best (and worst) and unscored stories are shown
HERO = (560, 300)  # size of the chart at the top
PARTS = ("rollout", "reference", "teacher", "update")  # of a step, in the order of time

STUDENT_CURVES = {
    "length_mean": "Story length, words",
    "entropy": "Entropy of a story, nats",
    "reward_std": "Spread of reward within a step",
    "kl": "KL of a story from the first student, nats",
    "kl_coef": "KL coefficient",
    "distinct_4": "Different 4-grams among a step's stories",
}
PPO_CURVES = {
    "policy_loss": "Policy loss",
    "value_loss": "Value loss",
    "explained_variance": "Variance explained by the value head",
    "clip_fraction": "Share of ratios clipped",
    "approx_kl": "KL of an update, nats a token",
    "grad_norm": "Gradient norm",
    "ratio_error": "Ratio error before the first update",
}
TEACHER_SUMS = {
    "requests": "Requests",
    "retries": "Asked again after a failure",
    "cached": "Replies that were kept from before",
    "tokens_in": "Tokens of prompts",
    "tokens_out": "Tokens of replies",
}
LATENCIES = {"p50": "half", "p90": "90 %", "p99": "99 %"}  # of a step's answers
READING_CURVES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens a second",
}


def write_report(run_folder: Path) -> Path:
    """Write report.html into the folder of a run, finished or not, and return its path.

    Raises UserError where the folder holds no run.
    """
    folder = Path(run_folder)
    metrics, config = read_metrics(folder), read_config(folder)
    if not metrics and not config:
        raise UserError(f"{folder} holds no run (no config.json, no metrics.jsonl): give the folder of a run")
    if not metrics:
        sections = ['<p class="note">No step is recorded yet.</p>']
    elif "reward_mean" in metrics[-1]:
        sections = interaction(folder, metrics)
    else:
        sections = pretraining(folder, metrics)
    sections.append(how_it_was_run(config))
    text = page.PAGE.format(
        name=escape(folder.resolve().name),
        style=plots.palette() + plots.STYLE + page.STYLE,
        subtitle=subtitle(metrics, config),
        sections="\n".join(filter(None, sections)),
    )
    # A story or a reply may hold lone surrogates, which UTF-8 has no bytes for.
    atomic_write(folder / "report.html", text.encode("utf-8", "replace"))
    return folder / "report.html"


def subtitle(metrics: list[dict], config: dict) -> str:
    parts = []
    if metrics:
        parts.append("The student told stories" if "reward_mean" in metrics[-1] else "The student read")
        steps = metrics[-1]["step"]
        parts.append(f"{number(steps)} step{'s' if steps != 1 else ''}")
    if config:
        started = datetime.datetime.fromisoformat(config["started"])
        parts += [config["device"], f"{started.day} {started:%B %Y, %H:%M} UTC"]
    return " · ".join(escape(part) for part in parts)


def how_it_was_run(config: dict) -> str:
    """Every option, then versions, device, commit and times."""
    if not config:
        return ""
    rest = {key: value for key, value in config.items() if key != "options"}
    lists = [page.facts([(key, shown(value)) for key, value in flat(each)]) for each in (config["options"], rest)]
    return details("How it was run", "".join(lists), opened=True)


def flat(values: dict, path: str = "") -> Iterable[tuple[str, object]]:
    """Nested options as pairs like (versions.torch, "2.9.0")."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def shown(value) -> str:
    if value is None or value == "" or value == []:
        return number(None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- an interaction run ---------------------------------------------------------------------------------------------


def interaction(folder: Path, metrics: list[dict]) -> list[str]:
    picked = Picked(read_stories(folder))
    scores = [
        chart(title(each), [Line(*columns(metrics, "step", f"{each}_mean"), colour(each))], y_range=(0, TOP_SCORE))
        for each in picked.criteria
    ]
    return [
        interaction_headline(metrics, picked.criteria),
        section(
            "What the teacher said",
            "Mean score of each step, from 0 to 3. In bold a rolling mean, its band one standard deviation of the "
            "steps in the window.",
            grid(scores),
        ),
        histograms(picked.counts),
        section("How the student changed", "", curves(metrics, STUDENT_CURVES)),
        before_and_after(folder),
        best_and_worst(picked),
        unscored(picked),
        details("Inside PPO", curves(metrics, PPO_CURVES)),
        asking(metrics),
    ]


def title(criterion: str) -> str:
    return criterion.replace("_", " ").capitalize()


def interaction_headline(metrics: list[dict], criteria: Sequence[str]) -> str:
    edge = max(1, min(EDGE, len(metrics) // 2))

    def ends(key: str) -> list[float | None]:
        values = column(metrics, key)
        return [mean(values[:edge]), mean(values[-edge:])] if len(values) > 1 else [mean(values)]

    last = metrics[-1]
    left_out = sum(value or 0 for value in column(metrics, "unscored"))
    spans = {0: "the only step", 1: "first step → last"}.get(len(metrics) // 2, f"first {edge} steps → last {edge}")
    tiles = [tile("Mean reward", page.change(ends("reward_mean")), spans, "reward")]
    for each in criteria:
        if ends(f"{each}_mean")[0] is not None:
            tiles.append(tile(escape(title(each)), page.change(ends(f"{each}_mean")), f"of {TOP_SCORE}", colour(each)))
    tiles += [
        tile("Words taken in", number(last.get("words_in")), f"{number(last.get('words_out'))} written"),
        tile("Unscored", number(left_out), "stories, left out of learning"),
    ]
    drawing = chart("Mean reward of a step", [Line(*columns(metrics, "step", "reward_mean"), "reward")], size=HERO)
    spent = [(part, sum(each or 0 for each in column(metrics, f"{part}_s"))) for part in PARTS]
    return page.hero(tiles, drawing + page.time_bar(spent))


def histograms(counts: dict[int, dict[str, list[int]]]) -> str:
    """Score shares in the first tenth of the steps against the last tenth."""
    steps = sorted(counts)
    if len(steps) < 2:
        return ""
    tenth = max(1, len(steps) // 10)
    drawings = []
    for each in counts[steps[0]]:
        early, late = (
            [sum(counts[step][each][score] for step in part) for score in range(TOP_SCORE + 1)]
            for part in (steps[:tenth], steps[-tenth:])
        )
        drawings.append(plots.histogram(title(each), early, late, colour(each)))
    return section(
        "How the scores spread",
        "Share of the stories with each score: in grey the first tenth of the steps, in colour the last tenth.",
        grid(drawings),
    )


def before_and_after(folder: Path) -> str:
    samples: dict[int, dict[str, dict]] = defaultdict(dict)
    for record in read_records(folder / SAMPLES):
        samples[record["index"]][record["when"]] = record
    pairs = [
        "".join(story_card(told[when], when.capitalize()) for when in ("before", "after") if when in told)
        for _, told in sorted(samples.items())[:PAIRS]
    ]
    return section(
        "The same openings, before and after",
        "The opening, in colour, is given. The student goes on from there, both times with the same random numbers.",
        "".join(f'<div class="pair">{pair}</div>' for pair in pairs),
    )


def best_and_worst(picked: "Picked") -> str:
    halves = [
        f"<div><h3>{name}</h3>{''.join(story_card(each, step_name(each)) for each in records)}</div>"
        for name, records in (("Best", picked.best), ("Worst", picked.worst))
        if records
    ]
    return section(
        "Best and worst stories",
        f"By reward, of all {number(picked.scored)} stories of the run that were scored; among equals, drawn by lot.",
        f'<div class="pair">{"".join(halves)}</div>' if halves else "",
    )


def unscored(picked: "Picked") -> str:
    cards = "".join(story_card(each, step_name(each)) for each in picked.unscored)
    return section(
        "Stories without a score",
        "No valid score came back for these, so they took no part in learning. The first ones:",
        f'<div class="cards">{cards}</div>' if cards else "",
    )


def step_name(record: dict) -> str:
    return f"Step {number(record['step'])}"


def asking(metrics: list[dict]) -> str:
    """What the teacher was asked and how fast it answered; "" where none was."""
    if not any(column(metrics, "teacher_requests")):
        return ""
    sums = {name: sum(value or 0 for value in column(metrics, f"teacher_{key}")) for key, name in TEACHER_SUMS.items()}
    cost = metrics[-1].get("teacher_cost")
    rows = [(name, number(total)) for name, total in sums.items()] + [("Cost", number(cost))] * bool(cost)
    latencies = [
        Line(*columns(metrics, "step", f"teacher_latency_{key}"), "plain", name, smooth=False)
        for key, name in LATENCIES.items()
    ]
    charts = [
        chart("Seconds that answers took at most", latencies),
        chart("Asked again after a failure", [Line(*columns(metrics, "step", "teacher_retries"))]),
    ]
    return details("Asking the teacher", page.facts(rows) + grid(charts))


class Picked:
    """What the page shows of stories.jsonl, from one pass that holds no more than that.

    counts[step][criterion][score]: how many stories; best, worst: different stories; unscored: the first ones.
    """

    def __init__(self, stories: Iterable[dict]):
        self.counts: dict[int, dict[str, list[int]]] = {}
        self.criteria = CRITERIA  # or what was graded instead
        self.scored = 0
        self.unscored: list[dict] = []
        best, worst = Top(PICKED), Top(PICKED)
        for record in stories:
            if record["reward"] is None:
                if len(self.unscored) < UNSCORED:
                    self.unscored.append(record)
                continue
            self.scored += 1
            best.offer(record["reward"], record)
            worst.offer(-record["reward"], record)
            if record["scores"]:  # a callable in the teacher's place gives a reward alone
                if record["step"] not in self.counts:
                    self.criteria = tuple(record["scores"])
                    self.counts[record["step"]] = {each: [0] * (TOP_SCORE + 1) for each in self.criteria}
                for each in self.criteria:
                    self.counts[record["step"]][each][round(record["scores"][each])] += 1
        self.best, self.worst = best.records(), worst.records()


class Top:
    """The records of the highest value, no two with the same story.

    Among equals a hash of step and index decides, so that neither early nor late stories are favoured.
    """

    def __init__(self, size: int):
        self.size = size
        self.heap: list[tuple[float, bytes, int, dict]] = []
        self.order = itertools.count()

    def offer(self, value: float, record: dict) -> None:
        if len(self.heap) == self.size and value < self.heap[0][0]:
            return
        if any(record["story"] == kept["story"] and record["opening"] == kept["opening"] for *_, kept in self.heap):
            return
        lot = hashlib.blake2b(f"{record['step']} {record['index']}".encode(), digest_size=8).digest()
        heapq.heappush(self.heap, (value, lot, next(self.order), record))
        if len(self.heap) > self.size:
            heapq.heappop(self.heap)

    def records(self) -> list[dict]:
        return [record for *_, record in sorted(self.heap, key=lambda entry: entry[:3], reverse=True)]


# ---- a pretraining run ----------------------------------------------------------------------------------------------


def pretraining(folder: Path, metrics: list[dict]) -> list[str]:
    losses = [
        Line(*columns(metrics, "words", "loss"), "plain", "train"),
        Line(*columns(metrics, "words", "val_loss"), "reward", "val", smooth=False),
    ]
    val, bits, speed = (
        [value for value in column(metrics, key) if value is not None]
        for key in ("val_loss", "val_bits_per_byte", "tokens_per_s")
    )
    tiles = [
        tile("Validation loss", page.change([val[0], val[-1]]), "nats a token, first → last", "reward") if val else "",
        tile("Bits a byte", page.change([bits[0], bits[-1]]), "on validation, first → last", "reward") if bits else "",
        tile("Words read", number(metrics[-1]["words"]), f"{number(metrics[-1]['tokens'])} tokens"),
        tile("Tokens a second", number(sorted(speed)[len(speed) // 2]), "median step") if speed else "",
    ]
    drawing = chart("Loss, nats a token", losses, x_name="words read", size=HERO)
    return [
        page.hero(tiles, drawing),
        section("How it went", "", curves(metrics, READING_CURVES, "words", "words read")),
        before_and_after(folder),
    ]


# ---- columns of numbers ---------------------------------------------------------------------------------------------


def column(metrics: list[dict], key: str) -> list[float | None]:
    return [record.get(key) for record in metrics]


def columns(metrics: list[dict], *keys: str) -> list[list[float | None]]:
    return [column(metrics, key) for key in keys]


def mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def curves(metrics: list[dict], titles: dict[str, str], x: str = "step", x_name: str = "step") -> str:
    drawings = []
    for key, title in titles.items():
        line = Line(*columns(metrics, x, key), smooth=key not in ("lr", "kl_coef"))  # set, not measured
        drawings.append(chart(title, [line], x_name=x_name))
    return grid(drawings)
