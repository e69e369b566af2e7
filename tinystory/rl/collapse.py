"""Warnings about a run, each with what to try: the stories collapse, or the scores carry no signal."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

WINDOW = 5  # steps that are averaged, but no more than hold so many stories:
STORIES = 1024


def warnings(metrics: Sequence[dict], kl_target: float, stories_per_step: int) -> dict[str, str]:
    """The warnings that the records of metrics.jsonl give reason for, by kind: "collapse" and "signal"."""
    window = min(WINDOW, max(STORIES // stories_per_step, 1))
    collapse, flat = signs_of_collapse(metrics, kl_target, window), scores_without_signal(metrics, window)
    return {kind: warning for kind, warning in (("collapse", collapse), ("signal", flat)) if warning}


def signs_of_collapse(metrics: Sequence[dict], kl_target: float, window: int = WINDOW) -> str:
    """What the last `window` records of metrics.jsonl show against the first, in one sentence; empty if nothing is
    wrong.

    The thresholds are coarse on purpose: each is far outside what a step's noise does to a mean of WINDOW steps.
    """
    if len(metrics) < 2 * window:
        return ""
    parts, signs = (metrics[:window], metrics[-window:]), []

    def first_and_last(name: str) -> list[float]:
        values: list[list[Any]] = [[record.get(name) for record in part] for part in parts]
        return [] if None in values[0] + values[1] else [fmean(part) for part in values]

    for metric, message, threshold in (
        ("distinct_4", "they grow alike (distinct_4 {:.2f} to {:.2f})", 0.6),
        ("story_clusters", "few clusters of stories are left ({:.0f} to {:.0f})", 0.4),
        ("length_mean", "they shrink ({:.0f} to {:.0f} words)", 0.5),
        ("entropy", "their entropy collapses ({:.0f} to {:.0f} nats)", 0.35),
    ):
        ends = first_and_last(metric)
        if ends and ends[1] < threshold * ends[0]:
            signs.append(message.format(*ends))
    kl, spread = first_and_last("kl"), first_and_last("reward_std")
    if kl and kl[1] > 3 * kl_target:
        signs.append(f"the KL runs away ({kl[1]:.1f} nats per story, target {kl_target:g})")
    if spread and spread[1] < 0.1 * spread[0]:
        signs.append("all stories have the same reward")
    if not signs:
        return ""
    advice = "try more --stories-per-step, a higher --kl-coef or --diversity, or a lower --learning-rate"
    return f"the stories collapse; {', '.join(signs)}: {advice}"


def scores_without_signal(metrics: Sequence[dict], window: int = WINDOW) -> str:
    """A sentence if in each of the last `window` steps all stories had the same score; else empty."""
    last = metrics[-window:]
    if len(last) < window or any(record.get("score_std") != 0 for record in last):
        return ""
    steps = f"{window} steps" if window > 1 else "step"
    return (
        f"all stories of the last {steps} had the same score ({last[-1]['score_mean']:g} in the last), so "
        "nothing is learned from the teacher: try another --teacher-model, criteria with more to tell apart "
        "(--teacher-prompt), --teacher-logprobs, or a student that was pretrained longer"
    )
