"""Evaluation during interaction: records and means of stories, and the choice of the best
checkpoint."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.builtin import dull
from tinystory.evaluate.graders import Graders, collect, send
from tinystory.evaluate.intervals import is_within_error, mean_of
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams
from tinystory.rl.policy import Policy, rollout, rollout_means
from tinystory.rl.reward import differences, story_rewards
from tinystory.run import distributed
from tinystory.run.errors import Stop
from tinystory.run.files import atomic_write
from tinystory.run.records import EVALUATIONS, SAMPLES, Record, read_records
from tinystory.student.generate import Story
from tinystory.teacher.grade import NOT_ASKED, Grade, highest_score, score_means

# Index of the first story of an evaluation. All evaluations use the same random numbers, and no
# training step uses them.
FIRST_INDEX = 10**9


def is_evaluated(config: InteractConfig, step: int) -> bool:
    """Whether the student is evaluated after this step."""
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


def learned_dull_text(history: Mapping[str, Any]) -> bool:
    """Whether a student with this history was trained on the built-in dull text, so that the style
    of a story can be recognised (`teller` in the records)."""
    return "dull" in (history.get("corpus") or ())


def story_records(
    step: int,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    rewards: Sequence[float | None],
    history: Mapping[str, Any],
) -> list[Record]:
    """Records of stories for stories.jsonl and evaluations.jsonl. history: the student's training
    history."""
    records = []
    rows = zip(
        stories, grades, rewards, differences([story.text for story in stories]), strict=True
    )
    for story, grade, reward, difference in rows:
        record: Record = {
            "step": step,
            "index": story.index,
            "opening": story.opening,
            "story": story.text,
            "reply": grade.reply or grade.error or "",
            "scores": grade.scores,
            "score": grade.score,
            "difference": difference,
            "reward": reward,
            "words": story.words,
            "ended": story.ended,
        }
        if learned_dull_text(history):
            record["teller"] = dull.style_of(story.text)
        records.append(record)
    return records


def story_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Measures of recorded stories: mean length, fraction ended, mean diversity; distinct_4 and
    number of clusters over all stories; the fraction of the stories in each style."""
    texts = [record["story"] for record in records]
    means: dict[str, float | None] = {
        "length_mean": fmean(record["words"] for record in records),
        "ended": fmean(record["ended"] == "eos" for record in records),
        # records of older versions have no differences
        "diversity_mean": mean_of(record.get("difference") for record in records),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    }
    styles = [record["teller"] for record in records if "teller" in record]
    if styles:
        for style in dull.STYLES:
            means[f"teller_{style}"] = styles.count(style) / len(styles)
    return means


def evaluate(
    policy: Policy,
    step: int,
    openings: Sequence[str],
    graders: Graders,
    stop: Stop,
) -> tuple[list[Story], list[Grade], list[Record]]:
    """Stories, grades and records of an evaluation: --eval-stories stories that continue the
    held-out openings. Grades are NOT_ASKED with --no-eval-graded. The records include the second
    judge's scores. Raises Interrupted on `stop`."""
    config = policy.config
    prompts = [openings[i % len(openings)] for i in range(config.eval_stories)]

    def on_story(story: Story) -> None:
        if config.eval_graded:
            send(graders.examiner, story)

    stories = rollout(policy, prompts, FIRST_INDEX, on_story)
    grades = [NOT_ASKED] * len(stories)
    if config.eval_graded:
        grades = collect(graders.examiner, stop)
    rewards = story_rewards(config, stories, [grade.score for grade in grades])
    records = story_records(step, stories, grades, rewards, policy.history)
    if config.judge:
        pairs = [(story.opening, story.text) for story in stories]
        judge = graders.judge
        judged = distributed.rank0_value(lambda: judge.grade_each(pairs) if judge else [])
        for record, grade in zip(records, judged, strict=True):
            record["judge"] = grade.score  # 0..1, only reported, never part of a reward
    return stories, grades, records


def step_means(
    stories: Sequence[Story], grades: list[Grade], records: Sequence[Record]
) -> dict[str, float | None]:
    """Metrics of a step's stories: `score_means`, `story_means`, `rollout_means`, and unscored, the
    number of stories that were sent to the teacher and have no score."""
    scores = [grade.score for grade in grades]
    unscored = scores.count(None) - grades.count(NOT_ASKED)
    means = score_means(grades) | story_means(records)
    return means | rollout_means(stories, scores) | {"unscored": unscored}


def evaluation_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Metrics of an evaluation's stories: mean reward, mean score as shown, mean score of the
    second judge if there is one, and `story_means`."""
    means = {"reward": reward_mean(records), "score_mean": mean_of(map(shown_score, records))}
    means |= story_means(records)
    if any("judge" in record for record in records):
        means["judge"] = mean_of(record.get("judge") for record in records)
    return means


def held_out_metrics(records: Sequence[Record]) -> dict[str, float | None]:
    """Metrics of an evaluation for metrics.jsonl: `evaluation_means`, as held_out_NAME."""
    return {f"held_out_{name}": mean for name, mean in evaluation_means(records).items()}


def shown_score(record: Record) -> float | None:
    """The score of a story as shown to users, from 0 to `highest_score`; None without a score.
    Records of older versions contain only the scores of the criteria."""
    scores = record["scores"] or {}
    score = record.get("score")
    if score is not None:
        return float(score * highest_score(scores))
    return float(sum(scores.values())) if scores else None


def reward_mean(records: Sequence[Record]) -> float | None:
    """Mean reward of the stories that have a reward; None if no story has one."""
    return mean_of(record["reward"] for record in records)


def becomes_best(config: InteractConfig, folder: Path, step: int) -> bool:
    """Whether the student evaluated at `step` becomes the checkpoint `best` of the run. With graded
    evaluations, `is_best` decides. With --no-eval-graded, every later student becomes `best`."""
    if not config.eval_graded:
        return True
    return distributed.rank0_value(lambda: is_best(read_records(folder / EVALUATIONS), step))


def is_best(records: Iterable[Record], step: int) -> bool:
    """Whether the mean reward of the evaluation at `step` is within one standard error of the
    highest mean reward so far (paired by story), and not below the mean reward of step 0. A smaller
    difference is noise, so the later student is preferred: it has learned from more stories."""
    # step -> {index of the story: reward}
    by_step: dict[int, dict[int, float]] = defaultdict(dict)
    for record in records:
        if record["reward"] is not None:
            by_step[record["step"]][record["index"]] = record["reward"]
    if step not in by_step:
        return False

    means = {at: fmean(rewards.values()) for at, rewards in by_step.items()}
    if means[step] < means.get(0, -math.inf):
        return False
    highest = by_step[max(means, key=means.__getitem__)]
    # An index has the same opening in every evaluation, so stories are compared in pairs.
    rewards = by_step[step]
    return is_within_error(list(rewards.values()), [highest.get(index) for index in rewards])


def write_samples(folder: Path, best_step: int) -> None:
    """Write samples.jsonl: the stories of two evaluations, before training and at `best_step`."""
    evaluations = evaluations_by_step(folder)
    lines = ""
    for when, step in (("before", 0), ("after", best_step)):
        for record in evaluations.get(step, ()):
            lines += json.dumps({"when": when} | record) + "\n"
    atomic_write(folder / SAMPLES, lines)


def evaluations_by_step(run: Path) -> dict[int, list[Record]]:
    """The records of evaluations.jsonl, grouped by step."""
    evaluations = defaultdict(list)
    for record in read_records(run / EVALUATIONS):
        evaluations[record["step"]].append(record)
    return dict(evaluations)
