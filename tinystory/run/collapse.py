"""Warnings from metrics.jsonl, once per kind: stories collapse, KL runs away, loss explodes, scores
have no signal."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean

WINDOW, STORIES = 5, 768  # averages are over WINDOW steps, or over fewer that have STORIES stories
# Kind, metric, text and factor: below 1 relative to the metric's first mean, above 1 to its lowest
# one. The factors are coarse on purpose: noise changes a mean over WINDOW steps far less.
SIGNS = (
    ("collapse", "distinct_4", "the stories grow alike", 0.6),
    ("collapse", "story_clusters", "few clusters of stories are left", 0.4),
    ("collapse", "length_mean", "the stories shrink", 0.5),
    ("collapse", "entropy", "the stories' entropy collapses", 0.35),
    ("collapse", "reward_std", "all stories have the same reward", 0.1),
    # dull text and stories differ by a factor of 1.9 (demo, 5 seeds)
    ("loss", "loss", "the loss explodes", 2.2),
    ("loss", "value_loss", "the value loss explodes", 10),
    ("loss", "grad_norm", "the gradient explodes", 10),
)
ADVICE = {
    "collapse": "more --stories-per-step, a higher --kl-coef or --diversity, or a lower --learning-rate",
    "kl": "a higher --kl-coef, a shorter --kl-horizon, a lower --learning-rate or fewer --epochs",
    "loss": "a lower --learning-rate, or --grad-clip 1",
    "predicted": "more stories per step with --graded",
    "signal": "another --teacher-model, criteria with more to tell apart (--teacher-prompt), --teacher-logprobs, or a "
    "student that was pretrained longer (scripts/doctor.py --calibrate tells a teacher that cannot judge)",
}
SAME = 0.9  # fraction of a step's stories with the same score from which on scores carry no signal
FEW = 160  # scores in a window below which no correlation is significant


class CollapseDetector:
    """Reads a run's records one at a time. warnings: per kind, the step and the sentence of the
    first warning."""

    def __init__(self, records: Iterable[dict] = (), kl_target: float = math.inf):
        self.kl_target = kl_target
        self.warnings: dict[str, tuple[int, str]] = {}
        self._last: deque[dict] = deque(maxlen=WINDOW)
        self._base: dict[str, float] = {}
        for record in records:
            self.add(record)

    def add(self, record: dict) -> dict[str, str]:
        """Add a step's record. Returns the sentences of new warnings, by kind."""
        self._last.append(record)
        while sum(map(_stories, self._last)) - _stories(self._last[0]) >= STORIES:
            self._last.popleft()
        signs: dict[str, list[str]] = {kind: [] for kind in ADVICE}
        for kind, metric, text, factor in SIGNS:
            if (mean := self._mean(metric)) is not None:
                base = self._base.setdefault(metric, mean)
                if factor > 1:
                    self._base[metric] = min(base, mean)
                if mean > factor * base if factor > 1 else mean < factor * base:
                    signs[kind].append(f"{text} ({base:.3g} to {mean:.3g})")
        if (kl := self._mean("kl")) is not None and kl > 3 * self.kl_target:
            signs["kl"].append(
                f"the KL runs away ({kl:.1f} nats per story, target {self.kl_target:g})"
            )
        if len(self._last) == WINDOW and all(record.get("skipped") for record in self._last):
            signs["loss"].append("every step skips minibatches")
        if (r_squared := record.get("score_r_squared") or 0) < 0:
            signs["predicted"].append(
                f"the predicted scores of step {record['step']} are worse than a constant (R-squared {r_squared:.2f})"
            )
        if sentence := self._without_signal():
            signs["signal"].append(f"{sentence}, so nothing is learned from the teacher")
        news = {
            k: f"{', '.join(s)}: try {ADVICE[k]}"
            for k, s in signs.items()
            if s and k not in self.warnings
        }
        self.warnings |= {kind: (record["step"], sentence) for kind, sentence in news.items()}
        return news

    def _mean(self, metric: str) -> float | None:
        """Mean over the window; None if the window is too short or one of its records lacks the
        metric."""
        values = [value for record in self._last if (value := record.get(metric)) is not None]
        return fmean(values) if self._enough and len(values) == len(self._last) else None

    @property
    def _enough(self) -> bool:
        return len(self._last) == WINDOW or sum(map(_stories, self._last)) >= STORIES

    def _without_signal(self) -> str:
        """A sentence on why the scores in the window carry no signal; "" if they do."""
        modes = [record.get("score_mode") or 0.0 for record in self._last]
        steps = f"{len(self._last)} steps" if len(self._last) > 1 else "step"
        if self._enough and min(modes) >= SAME:
            stories = "all" if min(modes) == 1 else f"{min(modes):.0%} or more of the"
            level = self._last[-1].get("score_mean") or 0
            return (
                f"{stories} stories of the last {steps} had the same score ({level:g} in the last)"
            )
        scored = sum(record.get("scored") or 0 for record in self._last)
        related = [
            abs(r)
            for name in ("score_length", "score_logprob")
            if (r := self._mean(name)) is not None
        ]
        # two standard errors
        if not related or scored < FEW or max(related) > 2 / math.sqrt(scored):
            return ""
        return f"the scores of the last {steps} are as unrelated to the stories as random ones"


def _stories(record: dict) -> int:
    return (record.get("scored") or 0) + (record.get("unscored") or 0)
