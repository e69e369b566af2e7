"""Warnings from metrics.jsonl, once per kind: the stories collapse, the KL exceeds its target, the
loss diverges, the student overfits, the scores have no signal, or a second judge disagrees."""

import math
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean
from typing import Any

# Moving averages are over WINDOW steps, or over as many of the last steps as hold STORIES stories.
# The pretraining loss is averaged over LOSS_STEPS, because a small batch holds either dull text or
# stories.
WINDOW = 5
STORIES = 768
LOSS_STEPS = 50
# Kind, metric, text and factor. A factor below 1 is relative to the metric's first average, and a
# factor above 1 to the lowest average. The factors are coarse on purpose: noise changes an average
# over WINDOW steps far less. The metrics of an evaluation are not averaged, because every evaluation
# has the same openings and random numbers.
SIGNS = (
    ("collapse", "distinct_4", "the stories become alike", 0.6),
    ("collapse", "story_clusters", "few clusters of stories are left", 0.4),
    ("collapse", "length_mean", "the stories shrink", 0.5),
    ("collapse", "entropy", "the stories' entropy collapses", 0.35),
    ("collapse", "reward_std", "all stories have the same reward", 0.1),
    ("collapse", "held_out_distinct_4", "the held-out stories become alike", 0.6),
    (
        "collapse",
        "held_out_diversity_mean",
        "the held-out stories become similar to one another",
        0.6,
    ),
    ("collapse", "held_out_story_clusters", "few clusters of held-out stories are left", 0.4),
    ("collapse", "held_out_style_story", "fewer held-out texts are stories, not dull text", 0.7),
    ("speed", "tokens_per_s", "the tokens per second fall", 0.25),
    # where dull text pauses, the loss rises to 1.7 times its lowest average (demo, 3 seeds)
    ("loss", "loss", "the loss diverges", 2.2),
    ("loss", "value_loss", "the value loss diverges", 10),
    ("loss", "grad_norm", "the gradient diverges", 10),
)
OVERFITTED = 1.2  # ratio of the validation loss to its lowest value
FAR = 3  # ratio of the KL to its target
ADVICE = {
    "collapse": "more --stories-per-step, a higher --kl-coef or --diversity, or a lower --learning-rate",
    "kl": "a higher --kl-coef, a shorter --kl-horizon, a lower --learning-rate or fewer --epochs",
    "loss": "a lower --learning-rate, or --grad-clip 1",
    "validation": "fewer --words, or a larger corpus",
    "speed": "to end other programs, OMP_WAIT_POLICY=passive, or fewer threads (OMP_NUM_THREADS=1)",
    "predicted": "more --grades, or another --teacher-prompt if the teacher was not calibrated, or only "
    "just above chance",
    "judge": "a higher --kl-coef, fewer --steps, or another --teacher-prompt",
    "signal": "another --teacher-model, more discriminating criteria (--teacher-prompt), or a "
    "student that was pretrained longer (scripts/doctor.py --calibrate measures whether the "
    "teacher can judge)",
}
SAME = 0.9  # scores carry no signal if this fraction of a step's stories has the same score
LEAST_R_SQUARED = 0.2  # minimum R-squared of predicted scores
FEW = 160  # with fewer scores in a window, no correlation is significant


class CollapseDetector:
    """Finds warnings in a run's records, one record at a time; a record of step 0 has the metrics
    of the evaluation before training. warnings: step and sentence of the first warning of each
    kind."""

    def __init__(self, records: Iterable[dict] = (), kl_target: float = math.inf):
        self.kl_target = kl_target
        self.warnings: dict[str, tuple[int, str]] = {}
        self._last: deque[dict] = deque(maxlen=WINDOW)
        self._losses: deque[Any] = deque(maxlen=LOSS_STEPS)
        self._skips: deque[bool] = deque(maxlen=WINDOW)
        self._base: dict[str, float] = {}
        self._judge_rose = False  # whether the second judge's score is above its first one
        self._lowest_validation = (math.inf, 0)  # the loss, and the words until then
        # (reward, second judge's score) of the last evaluations that have both
        self._evaluations: deque[tuple[float, float]] = deque(maxlen=3)
        for record in records:
            self.add(record)

    def add(self, record: dict) -> dict[str, str]:
        """The sentences of new warnings, by kind, that the record of a further step causes."""
        if record["step"] > 0:
            self._last.append(record)
            self._losses.append(record.get("loss"))
            self._skips.append(bool(record.get("skipped")))
            while self._stories() - graded_stories(self._last[0]) >= STORIES:
                self._last.popleft()
        signs: dict[str, list[str]] = {kind: [] for kind in ADVICE}
        for kind, metric, text, factor in SIGNS:
            level = record.get(metric) if metric.startswith("held_out_") else self._mean(metric)
            if level is None:
                continue
            base = self._base.setdefault(metric, level)
            if factor > 1:
                self._base[metric] = min(base, level)
            is_beyond = level > factor * base if factor > 1 else level < factor * base
            if is_beyond:
                signs[kind].append(f"{text} ({base:.3g} to {level:.3g})")
        kl = record.get("kl")
        if kl is not None and kl > FAR * self.kl_target:
            signs["kl"].append(
                f"the KL far exceeds its target ({kl:.1f} nats per story, target {self.kl_target:g})"
            )
        if len(self._skips) == WINDOW and all(self._skips):
            signs["loss"].append("every step skips minibatches")
        judge = record.get("held_out_judge")
        if judge is not None:
            self._judge_rose = judge > self._base.setdefault("held_out_judge", judge)
        if self._judge_rose:  # the student learned from the predicted scores
            self.warnings.pop("predicted", None)
        validation = record.get("val_loss")
        if validation is not None:
            words = record.get("words") or 0
            self._lowest_validation = min(self._lowest_validation, (validation, words))
            lowest, words_then = self._lowest_validation
            if validation > OVERFITTED * lowest:
                signs["validation"].append(
                    f"the student overfits: its validation loss was {lowest:.3g} after {words_then:,} "
                    f"words and is {validation:.3g} after {words:,}"
                )
        r_squared = record.get("score_r_squared")
        if r_squared is not None and r_squared < LEAST_R_SQUARED and not self._judge_rose:
            signs["predicted"].append(
                f"the scores predicted in step {record['step']} hardly distinguish stories "
                f"(R-squared {r_squared:.2f})"
            )
        disagreement = self._disagreement(record)
        if disagreement:
            signs["judge"].append(disagreement)
        without_signal = self._without_signal()
        if without_signal:
            signs["signal"].append(without_signal)

        new: dict[str, str] = {}
        for kind, sentences in signs.items():
            if sentences and kind not in self.warnings:
                new[kind] = f"{', '.join(sentences)}: try {ADVICE[kind]}"
                self.warnings[kind] = (record["step"], new[kind])
        return new

    def _stories(self) -> int:
        return sum(graded_stories(record) for record in self._last)

    def _is_full(self) -> bool:
        return len(self._last) == WINDOW or self._stories() >= STORIES

    def _mean(self, metric: str) -> float | None:
        """Mean of a metric over the window; None if the window is too short or a record lacks the
        metric."""
        if metric == "loss":
            values = list(self._losses)
            is_full = len(values) == LOSS_STEPS
        else:
            values = [record.get(metric) for record in self._last]
            is_full = self._is_full()
        if None in values or not is_full:
            return None
        return fmean(values)

    def _disagreement(self, record: dict) -> str:
        """A sentence if, in each of the last two evaluations, the reward rose and the second
        judge's score fell; else "". Without graded evaluations, the reward is that of the step."""
        reward = record.get("held_out_reward")
        if reward is None:
            reward = record.get("reward_mean")
        score = record.get("held_out_judge")
        if reward is None or score is None or record["step"] == 0:
            return ""
        self._evaluations.append((reward, score))
        changes = list(pairwise(self._evaluations))
        is_disagreement = all(new[0] > old[0] and new[1] < old[1] for old, new in changes)
        if len(changes) < 2 or not is_disagreement:
            return ""
        first, last = self._evaluations[0], self._evaluations[-1]
        return (
            f"over two evaluations the reward rose ({first[0]:.3g} to {last[0]:.3g}) and the "
            f"second judge's score fell ({first[1]:.3g} to {last[1]:.3g}): the student may be learning "
            "to please the teacher instead of writing better stories"
        )

    def _without_signal(self) -> str:
        """A sentence if the scores in the window are almost all equal, or look random; else ""."""
        if not self._is_full():
            return ""
        last = self._last
        steps = f"{len(last)} steps" if len(last) > 1 else "step"
        fraction = min(record.get("score_mode") or 0.0 for record in last)
        if fraction >= SAME:
            stories = "all" if fraction == 1 else f"{fraction:.0%} or more of the"
            level = last[-1].get("score_mean") or 0
            return (
                f"{stories} stories of the last {steps} had the same score ({level:g} in the last), "
                "so the student learns nothing from the teacher"
            )

        scored = sum(record.get("scored") or 0 for record in last)
        correlations = [self._mean("score_length"), self._mean("score_logprob")]
        known = [abs(correlation) for correlation in correlations if correlation is not None]
        # two standard errors
        if scored >= FEW and known and max(known) <= 2 / math.sqrt(scored):
            return (
                f"the scores of the last {steps} correlate neither with the length nor with the likelihood "
                "of a story, as random scores would"
            )
        return ""


def graded_stories(record: dict) -> int:
    return (record.get("scored") or 0) + (record.get("unscored") or 0)
