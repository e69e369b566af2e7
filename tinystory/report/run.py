"""report.html: one self-contained page about one run, without network access, scripts or other files.

It is generated only from the records in the run's folder, so it can be written again at any time.
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

from tinystory.report import charts, judges, page
from tinystory.report.charts import Line, chart, number
from tinystory.report.frontier import best_of_n, tilt
from tinystory.report.page import TOP_SCORE, colour, details, grid, section, story_card, tile
from tinystory.rl.reward import cluster_sizes
from tinystory.run.errors import UserError
from tinystory.run.folder import SAMPLES, Record, atomic_write, read_config, read_metrics, read_records, read_stories

EDGE = 5  # the headline compares the mean of this many first steps with that of the last ones
PAIRS, PICKED, UNSCORED = 12, 5, 3  # stories shown: before and after; best, worst and at random; unscored
HERO = (560, 300)  # size of the chart at the top, in pixels
PARTS = ("rollout", "reference", "teacher", "update")  # of a step, in chronological order

SAMENESS_CURVES = {
    "story_clusters": "Clusters of similar stories in a step",
    "diversity_mean": "Difference from the other stories, 0 to 1",
    "distinct_4": "Distinct 4-grams in a step’s stories",
    "ended": "Fraction of stories that end",
    "held_out_reward": "Reward of evaluations",
}
STUDENT_CURVES = {
    "objective": "Objective: reward less the KL penalty",
    "kl": "KL to the initial student per story, nats",
    "kl_coef": "KL coefficient",
    "entropy": "Entropy per story, nats",
    "length_mean": "Story length, words",
    "reward_std": "Standard deviation of the reward in a step",
}
PPO_CURVES = {
    "policy_loss": "Policy loss",
    "value_loss": "Value loss",
    "explained_variance": "Variance of the returns explained by the values",
    "clip_fraction": "Fraction of ratios clipped",
    "approx_kl": "KL of an update, nats per token",
    "grad_norm": "Gradient norm",
    "ratio_error": "Ratio error before the first update",
}
TEACHER_SUMS = {
    "requests": "Requests",
    "retries": "Retries after a failure",
    "cached": "Replies from the cache",
    "tokens_in": "Prompt tokens",
    "tokens_out": "Reply tokens",
}
LATENCIES = {"p50": "50 %", "p90": "90 %", "p99": "99 %"}  # percentiles over the requests of a step
READING_CURVES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}


def write_report(run_folder: Path) -> Path:
    """Write report.html into the folder of a run, finished or not, and return its path.

    Raises UserError if the folder holds no run.
    """
    folder = Path(run_folder)
    metrics, config = read_metrics(folder), read_config(folder)
    if not metrics and not config:
        raise UserError(f"{folder} holds no run (no config.json, no metrics.jsonl): give the folder of a run")
    if not metrics:
        sections = ['<p class="note">No step is recorded yet.</p>']
    elif "reward_mean" in metrics[-1]:
        sections = interaction(folder, metrics, config)
    else:
        sections = pretraining(metrics)
    sections.append(how_it_was_run(config))
    text = page.PAGE.format(
        name=escape(folder.resolve().name),
        style=charts.palette() + charts.STYLE + page.STYLE,
        subtitle=subtitle(metrics, config),
        sections="\n".join(filter(None, sections)),
    )
    # A story or a reply may hold lone surrogates, which UTF-8 cannot encode.
    atomic_write(folder / "report.html", text.encode("utf-8", "replace"))
    return folder / "report.html"


def subtitle(metrics: list[Record], config: Record) -> str:
    parts = []
    if metrics:
        parts.append("The student told stories" if "reward_mean" in metrics[-1] else "The student read")
        steps = metrics[-1]["step"]
        parts.append(f"{number(steps)} step{'s' if steps != 1 else ''}")
    if config:
        started = datetime.datetime.fromisoformat(config["started"])
        parts += [config["device"], f"{started.day} {started:%B %Y, %H:%M} UTC"]
    return " · ".join(escape(part) for part in parts)


def how_it_was_run(config: Record) -> str:
    """All options, then versions, device, commit and times."""
    if not config:
        return ""
    rest = {key: value for key, value in config.items() if key != "options"}
    lists = [page.facts([(key, shown(value)) for key, value in flat(each)]) for each in (config["options"], rest)]
    return details("How it was run", "".join(lists), opened=True)


def flat(values: Record, path: str = "") -> Iterable[tuple[str, object]]:
    """Nested options as pairs like (versions.torch, "2.9.0")."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def shown(value: object) -> str:
    if value is None or value == "" or value == []:
        return number(None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- an interaction run ---------------------------------------------------------------------------------------------


def scorer(config: Record) -> str:
    """Who scored the stories: the models' names, or the callable's; "" if it is not recorded."""
    options = config.get("options", {})
    asked, scored_by = options.get("teachers"), options.get("scored_by")
    teachers = asked if isinstance(asked, list) and asked else [options.get("teacher")]
    models = dict.fromkeys(str(each["model"]) for each in teachers if isinstance(each, dict) and each.get("model"))
    return ", ".join(models) or (Path(scored_by).name if isinstance(scored_by, str) else "")


def interaction(folder: Path, metrics: list[Record], config: Record) -> list[str]:
    picked, scored_by = Picked(read_stories(folder)), scorer(config)
    scores = [
        chart(title(each), [curve(metrics, f"{each}_mean", colour(each))], y_range=(0, TOP_SCORE))
        for each in picked.criteria
    ]
    return [
        interaction_headline(metrics, picked.criteria),
        sameness(metrics, picked),
        section(
            "What the teacher said",
            f"{judges.scored_by_note(scored_by, config)} Mean score per step, from 0 to 3. The bold line is a rolling "
            f"mean, the band one standard deviation over its window.{without_signal(metrics)}",
            grid(scores),
        ),
        histograms(picked.counts),
        price(metrics, picked),
        section("How the student changed", "", curves(metrics, STUDENT_CURVES)),
        judges.judges_section(folder, scored_by),
        before_and_after(folder, scored_by),
        random_best_and_worst(picked, scored_by),
        unscored(picked),
        details("PPO diagnostics", curves(metrics, PPO_CURVES)),
        teacher_requests(metrics),
    ]


def without_signal(metrics: list[Record]) -> str:
    flat = sum(std == 0 for std in column(metrics, "score_std"))
    return f" But in {flat} of {len(metrics)} steps all stories had the same score." if flat else ""


def title(criterion: str) -> str:
    return criterion.replace("_", " ").capitalize()


def interaction_headline(metrics: list[Record], criteria: Sequence[str]) -> str:
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
            scores = page.change(ends(f"{each}_mean"))
            tiles.append(tile(escape(title(each)), scores, f"out of {TOP_SCORE}", colour(each)))
    if ends("story_clusters")[0] is not None:
        tiles.append(tile("Story clusters", page.change(ends("story_clusters"), 0), "in the stories of a step"))
    if ends("ended")[0] is not None:
        tiles.append(tile("Told to the end", page.change(ends("ended")), "fraction of the stories"))
    tiles += [
        tile("Words taken in", number(last.get("words_in")), f"{number(last.get('words_out'))} written"),
        tile("Unscored", number(left_out), "stories, left out of the update"),
    ]
    drawing = chart("Mean reward per step", [curve(metrics, "reward_mean", "reward")], size=HERO)
    spent = [(part, sum(each or 0 for each in column(metrics, f"{part}_s"))) for part in PARTS]
    return page.hero(tiles, drawing + page.time_bar(spent))


def histograms(counts: dict[int, dict[str, list[int]]]) -> str:
    """The distribution of scores in the first tenth of the steps and in the last tenth."""
    steps = sorted(counts)
    if len(steps) < 2:
        return ""
    tenth = max(1, len(steps) // 10)
    drawings = []
    for each in counts[steps[0]]:
        early, late = (
            [sum(counts[step][each][score] for step in part if each in counts[step]) for score in range(TOP_SCORE + 1)]
            for part in (steps[:tenth], steps[-tenth:])
        )
        drawings.append(charts.histogram(title(each), early, late, colour(each)))
    return section(
        "Distribution of the scores",
        "Fraction of stories with each score, in the first tenth of the steps (grey) and in the last (colour).",
        grid(drawings),
    )


def sameness(metrics: list[Record], picked: "Picked") -> str:
    """Whether a higher score was bought by telling the same story again."""
    highest = TOP_SCORE * len(picked.criteria) or 1
    pairs = zip(column(metrics, "diversity_mean"), column(metrics, "score_mean"), strict=True)
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    trail = charts.trail(
        "Score against difference, step by step", points, "difference from the other stories", (0, 1), (0, highest)
    )
    ends = [picked.first, picked.last] if picked.first is not picked.last else [picked.last]
    sizes = [(cluster_sizes([r["story"] for r in records]), step_name(records[0])) for records in ends if records]
    bars = "".join(page.cluster_bar(*each) for each in sizes)
    return section(
        "Better stories, or one story again?",
        "A score can be bought by telling one good story over and over: then the trail climbs to the left, the "
        "clusters become few and their blocks wide. Each block of a bar is a cluster of similar stories, as wide as it "
        "has stories; two stories are similar if they share more than 12 % of their phrases of three words, names "
        "aside.",
        bars + grid([trail, *curve_charts(metrics, SAMENESS_CURVES)]),
    )


def price(metrics: list[Record], picked: "Picked") -> str:
    """Reward against KL, beside what the starting student could earn without any training."""
    rewards = [record["reward"] for record in picked.first if record["reward"] is not None]
    pairs = zip(column(metrics, "kl"), column(metrics, "reward_mean"), strict=True)
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not rewards or metrics[0]["step"] != picked.first[0]["step"] or len(points) < 2:
        return ""
    beside = {"best possible": tilt(rewards), "best of n": best_of_n(rewards)}
    kl, reward = zip(*points, *itertools.chain(*beside.values()), strict=True)
    ranges = (min(0.0, *kl), max(kl) * 1.05), (min(reward) - 0.02, max(reward) + 0.02)
    name = "KL to the initial student, nats per story"
    trail = charts.trail("Reward against KL, step by step", points, name, *ranges, beside)
    return section(
        "What it cost",
        "How far the student went from where it started, and what it earned there. In grey, what its first stories say "
        "could be had without training: by telling each story in proportion to p exp(reward / beta), which nothing "
        "beats at its KL, and by telling the best of 1, 2, 4, 8 and 16.",
        grid([trail]),
    )


def before_and_after(folder: Path, scored_by: str) -> str:
    opinions = judges.read_opinions(folder)
    samples: dict[int, dict[str, Record]] = defaultdict(dict)
    for record in read_records(folder / SAMPLES):
        samples[record["index"]][record["when"]] = record
    pairs = [
        "".join(
            story_card(
                told[when],
                f"{when.capitalize()}, step {number(told[when]['step'])}",
                scored_by,
                judges.also_said(opinions, told[when]),
            )
            for when in ("before", "after")
            if when in told
        )
        for _, told in sorted(samples.items())[:PAIRS]
    ]
    return section(
        "Evaluation, before and after",
        "The opening, in colour, is given; the student continues it, both times with the same random numbers. It was "
        "never trained on, unless there is only one. After: the latest student that earned as much as any in "
        "evaluations, within a standard error, which is kept as the checkpoint best.",
        "".join(f'<div class="pair">{pair}</div>' for pair in pairs),
    )


def random_best_and_worst(picked: "Picked", scored_by: str) -> str:
    columns = [
        f"<div><h3>{name}</h3>{''.join(story_card(each, step_name(each), scored_by) for each in records)}</div>"
        for name, records in (
            ("At random, of the last step", picked.drawn),
            ("Best of the run", picked.best),
            ("Worst of the run", picked.worst),
        )
        if records
    ]
    return section(
        "What it tells now, and the best and worst it told",
        "The first column is what to expect of the student. Best and worst are by reward, among all "
        f"{number(picked.scored)} scored stories, the same story once; ties are broken at random.",
        f'<div class="three">{"".join(columns)}</div>' if columns else "",
    )


def unscored(picked: "Picked") -> str:
    cards = "".join(story_card(each, step_name(each)) for each in picked.unscored)
    return section(
        "Stories without a score",
        "The teacher returned no valid score for these, so they were left out of the update. The first ones:",
        f'<div class="cards">{cards}</div>' if cards else "",
    )


def step_name(record: Record) -> str:
    return f"Step {number(record['step'])}"


def teacher_requests(metrics: list[Record]) -> str:
    """Counts and latencies of the requests to the teacher; "" if there were none."""
    if not any(column(metrics, "teacher_requests")):
        return ""
    sums = {name: sum(value or 0 for value in column(metrics, f"teacher_{key}")) for key, name in TEACHER_SUMS.items()}
    cost = metrics[-1].get("teacher_cost")
    rows = [(name, number(total)) for name, total in sums.items()] + [("Cost", number(cost))] * bool(cost)
    latencies = [curve(metrics, f"teacher_latency_{key}", name=name, smooth=False) for key, name in LATENCIES.items()]
    drawings = [
        chart("Latency percentiles, seconds", latencies),
        chart("Retries after a failure", [curve(metrics, "teacher_retries")]),
    ]
    return details("Requests to the teacher", page.facts(rows) + grid(drawings))


class Picked:
    """What the page shows from stories.jsonl, collected in one pass without holding the other stories in memory.

    criteria: as graded, () if no story has scores; counts[step][criterion][score]: numbers of stories; best, worst:
    distinct stories by reward; unscored: the first ones; first, last: the stories of the first step and of the last,
    the same list if there is only one; drawn: some of the last step, at random, but the same ones each time.
    """

    def __init__(self, stories: Iterable[Record]):
        self.counts: dict[int, dict[str, list[int]]] = {}
        self.criteria: tuple[str, ...] = ()
        self.scored = 0
        self.unscored: list[Record] = []
        self.first: list[Record] = []
        self.last: list[Record] = self.first
        best, worst = Top(PICKED), Top(PICKED)
        for record in stories:
            if self.last and self.last[0]["step"] != record["step"]:
                self.last = []
            self.last.append(record)
            if record["reward"] is None:
                if len(self.unscored) < UNSCORED:
                    self.unscored.append(record)
                continue
            self.scored += 1
            best.offer(record["reward"], record)
            worst.offer(-record["reward"], record)
            if record["scores"]:  # with --reward a callable replaces the teacher and gives no scores
                self.criteria = tuple(record["scores"])
                counts = self.counts.setdefault(record["step"], {})
                for each, score in record["scores"].items():  # another --teacher-prompt may have come with a resume
                    counts.setdefault(each, [0] * (TOP_SCORE + 1))[round(score)] += 1
        self.best, self.worst = best.records(), worst.records()
        self.drawn = sorted(self.last, key=shuffled)[:PICKED]


def shuffled(record: Record) -> bytes:
    """A key that puts stories in random order: a hash of step and index."""
    return hashlib.blake2b(f"{record['step']} {record['index']}".encode(), digest_size=8).digest()


class Top:
    """The records with the highest values, no two with the same story.

    Ties are broken at random, so that neither early nor late stories are favoured.
    """

    def __init__(self, size: int):
        self.size = size
        self.heap: list[tuple[float, bytes, int, Record]] = []
        self.order = itertools.count()

    def offer(self, value: float, record: Record) -> None:
        if len(self.heap) == self.size and value < self.heap[0][0]:
            return
        if any(record["story"] == kept["story"] and record["opening"] == kept["opening"] for *_, kept in self.heap):
            return
        heapq.heappush(self.heap, (value, shuffled(record), next(self.order), record))
        if len(self.heap) > self.size:
            heapq.heappop(self.heap)

    def records(self) -> list[Record]:
        return [record for *_, record in sorted(self.heap, key=lambda entry: entry[:3], reverse=True)]


# ---- a pretraining run ----------------------------------------------------------------------------------------------


def pretraining(metrics: list[Record]) -> list[str]:
    losses = [
        curve(metrics, "loss", x="words", name="train"),
        curve(metrics, "val_loss", "reward", x="words", name="val", smooth=False),
    ]
    val, bits, speed = (
        [value for value in column(metrics, key) if value is not None]
        for key in ("val_loss", "val_bits_per_byte", "tokens_per_s")
    )
    drop, bits_drop = (page.change([values[0], values[-1]]) if values else "" for values in (val, bits))
    tiles = [
        tile("Validation loss", drop, "nats per token, first → last", "reward") if val else "",
        tile("Bits per byte", bits_drop, "on validation, first → last", "reward") if bits else "",
        tile("Words read", number(metrics[-1].get("words")), f"{number(metrics[-1].get('tokens'))} tokens"),
        tile("Tokens per second", number(sorted(speed)[len(speed) // 2]), "median step") if speed else "",
    ]
    drawing = chart("Loss, nats per token", losses, x_name="words read", size=HERO)
    return [
        page.hero(tiles, drawing),
        section("Training", "", curves(metrics, READING_CURVES, "words", "words read")),
    ]


# ---- columns of the metrics -----------------------------------------------------------------------------------------


def column(metrics: list[Record], key: str) -> list[float | None]:
    return [record.get(key) for record in metrics]


def curve(
    metrics: list[Record], key: str, colour: str = "plain", *, x: str = "step", name: str = "", smooth: bool = True
) -> Line:
    return Line(column(metrics, x), column(metrics, key), colour, name, smooth)


def mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def curves(metrics: list[Record], titles: dict[str, str], x: str = "step", x_name: str = "step") -> str:
    return grid(curve_charts(metrics, titles, x, x_name))


def curve_charts(metrics: list[Record], titles: dict[str, str], x: str = "step", x_name: str = "step") -> list[str]:
    drawings = []
    for key, title in titles.items():
        line = curve(metrics, key, x=x, smooth=key not in ("lr", "kl_coef"))  # these are set, not measured
        drawings.append(chart(title, [line], x_name=x_name))
    return drawings
