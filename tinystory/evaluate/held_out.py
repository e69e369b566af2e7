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
from tinystory.evaluate.graders import collect, send
from tinystory.evaluate.intervals import is_within_error, mean_of
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams
from tinystory.rl.policy import Policy, rollout, rollout_means
from tinystory.rl.reward import differences, story_rewards
from tinystory.run import distributed
from tinystory.run.errors import Stop
from tinystory.run.files import atomic_write
from tinystory.run.records import EVALUATIONS, SAMPLES, Record, read_records
from tinystory.student.generate import Story
from tinystory.teacher.grade import NOT_ASKED, Grade, Grader, highest_score, score_means

FIRST_INDEX = 10**9  # evaluations draw the same random numbers each time, and none of training's


def is_evaluated(config: InteractConfig, step: int) -> bool:
    """Whether the student is evaluated after this step."""
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


def has_dull_tellers(history: Mapping[str, Any]) -> bool:
    """Whether a student with this history was trained on the built-in dull tellers, whose sentences
    are known."""
    return "dull" in (history.get("corpus") or ())


def story_records(
    step: int,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    rewards: Sequence[float | None],
    history: Mapping[str, Any],
) -> list[Record]:
    """Lines of stories.jsonl and evaluations.jsonl. history: the student's."""
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
        if has_dull_tellers(history):
            record["teller"] = dull.kind_of(story.text)
        records.append(record)
    return records


def story_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Means of length, endings and diversity; distinct_4 and clusters over all stories; the
    fraction of each teller."""
    texts = [record["story"] for record in records]
    means: dict[str, float | None] = {
        "length_mean": fmean(record["words"] for record in records),
        "ended": fmean(record["ended"] == "eos" for record in records),
        # older versions recorded no differences
        "diversity_mean": mean_of(record.get("difference") for record in records),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    }
    tellers = [record["teller"] for record in records if "teller" in record]
    if tellers:
        for kind in dull.KINDS:
            means[f"teller_{kind}"] = tellers.count(kind) / len(tellers)
    return means


def evaluate(
    policy: Policy,
    step: int,
    openings: Sequence[str],
    grader: Grader,
    judge: Grader | None,
    stop: Stop,
) -> tuple[list[Story], list[Grade], list[Record]]:
    """--eval-stories stories to the held-out openings, their grades (NOT_ASKED with
    --no-eval-graded), and their records, with the second judge's scores. judge: None without
    --judge and on all ranks but 0. Raises Interrupted on `stop`."""
    config = policy.config
    prompts = [openings[i % len(openings)] for i in range(config.eval_stories)]

    def on_story(story: Story) -> None:
        if config.eval_graded:
            send(grader, story)

    stories = rollout(policy, prompts, FIRST_INDEX, on_story)
    grades = [NOT_ASKED] * len(stories)
    if config.eval_graded:
        grades = collect(grader, stop)
    rewards = story_rewards(config, stories, [grade.score for grade in grades])
    records = story_records(step, stories, grades, rewards, policy.history)
    if config.judge:
        pairs = [(story.opening, story.text) for story in stories]
        judged = distributed.rank0_value(lambda: judge.grade_each(pairs) if judge else [])
        for record, grade in zip(records, judged, strict=True):
            record["judge"] = grade.score  # 0..1, reported, and never a reward
    return stories, grades, records


def step_means(
    stories: Sequence[Story], grades: list[Grade], records: Sequence[Record]
) -> dict[str, float | None]:
    """Means of a step's stories: `score_means`, `story_means` and `rollout_means`. unscored: those
    that the teacher was asked about in vain."""
    scores = [grade.score for grade in grades]
    unscored = scores.count(None) - grades.count(NOT_ASKED)
    means = score_means(grades) | story_means(records)
    return means | rollout_means(stories, scores) | {"unscored": unscored}


def evaluation_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Means of an evaluation's stories: of rewards, scores as they are shown, the second judge's
    scores if there is one, and `story_means`."""
    means = {"reward": reward_mean(records), "score_mean": mean_of(map(shown_score, records))}
    means |= story_means(records)
    if any("judge" in record for record in records):
        means["judge"] = mean_of(record.get("judge") for record in records)
    return means


def shown_score(record: Record) -> float | None:
    """A story's score as it is shown, from 0 to `highest_score`. Older versions recorded only those
    of the criteria."""
    scores = record["scores"] or {}
    score = record.get("score")
    if score is not None:
        return float(score * highest_score(scores))
    return float(sum(scores.values())) if scores else None


def reward_mean(records: Sequence[Record]) -> float | None:
    """None if no story has a reward."""
    return mean_of(record["reward"] for record in records)


def becomes_best(config: InteractConfig, folder: Path, step: int) -> bool:
    """Whether the student evaluated at `step` becomes the checkpoint `best` of the run: if it
    `is_best`, or without grades, as each later student does."""
    if not config.eval_graded:
        return True
    return distributed.rank0_value(lambda: is_best(read_records(folder / EVALUATIONS), step))


def is_best(records: Iterable[Record], step: int) -> bool:
    """Whether the evaluation at `step` in evaluations.jsonl has the highest mean reward so far,
    within one standard error, and none below that of step 0: a smaller difference is noise, and the
    later student is preferred, as it has learned from more stories."""
    by_step: dict[int, dict[int, float]] = defaultdict(dict)  # rewards by the story's index
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
    """Write samples.jsonl: the stories of the evaluations before training and of `best`."""
    evaluations = evaluations_by_step(folder)
    lines = ""
    for when, step in (("before", 0), ("after", best_step)):
        for record in evaluations.get(step, ()):
            lines += json.dumps({"when": when} | record) + "\n"
    atomic_write(folder / SAMPLES, lines)


def evaluations_by_step(run: Path) -> dict[int, list[Record]]:
    evaluations = defaultdict(list)
    for record in read_records(run / EVALUATIONS):
        evaluations[record["step"]].append(record)
    return dict(evaluations)
