"""Warnings about a run, each kind once, with what to try: the stories collapse, the KL runs away, a loss explodes, or
the scores carry no signal. They are looked for after every step, in the records of metrics.jsonl alone."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import StatisticsError, correlation, fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports need no torch
    from tinystory.student.generate import Story

WINDOW = 5  # steps that are averaged
# Fraction of a step's scores that may be equal before they say nothing.
SAME = 0.9
# Scores that a judge draws at random are related to none of these. FEW: stories of a window that show it.
RELATIONS, FEW = ("score_length", "score_logprob", "rank_agreement"), 160


class Watch:
    """Reads a run's records one at a time. warnings: per kind ("collapse", "kl", "loss", "signal"), the first step that
    gave reason for it, and one sentence."""

    def __init__(self, records: Iterable[dict] = (), kl_target: float = math.inf):
        self.kl_target = kl_target
        self.warnings: dict[str, tuple[int, str]] = {}
        self._first: list[dict] = []
        self._last: deque[dict] = deque(maxlen=WINDOW)
        self._steps, self._lowest = 0, math.inf  # mean loss of WINDOW steps
        for record in records:
            self.add(record)

    def add(self, record: dict) -> dict[str, str]:
        """The warnings that this step gives reason for and no earlier one did, by kind."""
        self._last.append(record)
        self._steps += 1
        if self._steps <= WINDOW:
            self._first.append(record)
        if self._steps < WINDOW:
            return {}
        last = list(self._last)
        self._lowest = min([self._lowest, *means(last, "loss")])
        first = self._first if self._steps >= 2 * WINDOW else []
        signs = {
            "collapse": signs_of_collapse(first, last),
            "kl": runaway_kl(last, self.kl_target),
            "loss": exploding_loss(first, last, self._lowest),
            "signal": scores_without_signal(last),
        }
        news = {kind: sentence for kind, sentence in signs.items() if sentence and kind not in self.warnings}
        self.warnings |= {kind: (record["step"], sentence) for kind, sentence in news.items()}
        return news


def means(records: Sequence[dict], name: str) -> list[float]:
    """The mean of a metric over the records, in a list; [] if one of them, or all, lack it."""
    values: list[Any] = [record.get(name) for record in records]
    return [] if None in values or not values else [fmean(values)]


def signs_of_collapse(first: Sequence[dict], last: Sequence[dict]) -> str:
    """What the last records show against the first, in one sentence; empty if nothing is wrong.

    The thresholds are coarse on purpose: each is far outside what a step's noise does to a mean of WINDOW steps.
    """
    signs = []
    for metric, message, threshold in (
        ("distinct_4", "they grow alike (distinct_4 {:.2f} to {:.2f})", 0.6),
        ("story_clusters", "few clusters of stories are left ({:.0f} to {:.0f})", 0.4),
        ("length_mean", "they shrink ({:.0f} to {:.0f} words)", 0.5),
        ("entropy", "their entropy collapses ({:.0f} to {:.0f} nats)", 0.35),
        ("reward_std", "all have the same reward", 0.1),
    ):
        ends = means(first, metric) + means(last, metric)
        if len(ends) == 2 and ends[1] < threshold * ends[0]:
            signs.append(message.format(*ends))
    if not signs:
        return ""
    advice = "try more --stories-per-step, a higher --kl-coef or --diversity, or a lower --learning-rate"
    return f"the stories collapse; {', '.join(signs)}: {advice}"


def runaway_kl(last: Sequence[dict], kl_target: float) -> str:
    kl = means(last, "kl")
    if not kl or kl[0] <= 3 * kl_target:
        return ""
    return (
        f"the KL runs away ({kl[0]:.1f} nats per story, target {kl_target:g}): "
        "try a higher --kl-coef, a shorter --kl-horizon, a lower --learning-rate or fewer --epochs"
    )


def exploding_loss(first: Sequence[dict], last: Sequence[dict], lowest: float) -> str:
    """A sentence if the loss of pretraining has risen far above its lowest mean over WINDOW steps; or if in PPO the
    value loss or the gradient is ten times what it was, or each of the last steps skipped a minibatch."""
    loss = means(last, "loss")
    if loss and loss[0] > 1.5 * lowest:
        return (
            f"the loss explodes ({lowest:.2f} to {loss[0]:.2f} nats per token): "
            "try a lower --learning-rate or --muon-learning-rate, a longer --warmup, or --grad-clip 1"
        )
    signs = ["minibatches are skipped in every step"] * all(record.get("skipped") for record in last)
    for metric in ("value_loss", "grad_norm") if "policy_loss" in last[-1] else ():
        ends = means(first, metric) + means(last, metric)
        if len(ends) == 2 and ends[1] > 10 * ends[0]:
            signs.append(f"{metric} {ends[0]:.3g} to {ends[1]:.3g}")
    advice = "try a lower --learning-rate, fewer --epochs, or --grad-clip 1"
    return f"the updates explode; {', '.join(signs)}: {advice}" if signs else ""


def scores_without_signal(last: Sequence[dict]) -> str:
    """A sentence if in each of the last WINDOW steps (nearly) all stories had the same score, or if the scores of all
    these steps are related to nothing that could be measured, as random ones would be; else empty."""
    modes = [record.get("score_mode") or 0.0 for record in last]
    scored = sum(record.get("scored") or 0 for record in last)
    related = [abs(value) for name in RELATIONS for value in means(last, name)]
    if min(modes) >= SAME:
        stories = "all" if min(modes) == 1 else f"{min(modes):.0%} or more of the"
        level = last[-1].get("score_mean") or 0
        sign = f"{stories} stories of the last {WINDOW} steps had the same score ({level:g} in the last)"
    elif related and scored >= FEW and max(related) < 2 / math.sqrt(scored):  # two standard errors of a correlation
        sign = (
            f"the scores of the last {WINDOW} steps have nothing to do with the stories' length or likelihood, as if "
            "drawn at random (scripts/doctor.py --calibrate tells)"
        )
    else:
        return ""
    return (
        f"{sign}, so nothing is learned from the teacher: try another --teacher-model, criteria with more to tell "
        "apart (--teacher-prompt), --teacher-logprobs, or a student that was pretrained longer"
    )


def score_relations(scores: Sequence[float | None], stories: Sequence["Story"]) -> dict[str, float | None]:
    """Pearson's correlation of the scores with the stories' words (score_length) and with their mean log-probability
    per token under the policy that wrote them (score_logprob), None where undefined; and the number of stories scored.
    """
    rows = [
        (score, story.words, float(story.logprobs.mean())) for score, story in zip(scores, stories, strict=True)
        if score is not None and len(story.tokens)
    ]  # fmt: skip

    def related(column: int) -> float | None:
        try:
            return correlation([row[0] for row in rows], [row[column] for row in rows])
        except StatisticsError:  # fewer than two stories, or a column without variance
            return None

    return {"scored": len(rows), "score_length": related(1), "score_logprob": related(2)}
