"""Evaluation during interaction, on held-out openings, and the choice of the best checkpoint."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from tinystory.config import InteractConfig
from tinystory.evaluate.graders import Graders
from tinystory.evaluate.intervals import is_within_error
from tinystory.evaluate.story_records import story_records
from tinystory.rl.policy import Policy, rollout
from tinystory.rl.reward import differences, story_rewards
from tinystory.run import distributed
from tinystory.run.errors import Stop
from tinystory.run.files import atomic_write
from tinystory.run.records import EVALUATIONS, SAMPLES, Record, read_records
from tinystory.student.generate import Story
from tinystory.teacher.grade import NOT_ASKED, Grade

# Index of the first story of an evaluation. All evaluations use the same random numbers, and no
# training step uses them.
FIRST_INDEX = 10**9


def is_evaluated(config: InteractConfig, step: int) -> bool:
    """Whether the student is evaluated after this step."""
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


def evaluate(
    policy: Policy,
    step: int,
    openings: Sequence[str],
    graders: Graders,
    stop: Stop,
    first_index: int = FIRST_INDEX,
) -> tuple[list[Story], list[Grade], list[Record]]:
    """Stories, grades and records of an evaluation: --eval-stories stories that continue the
    held-out openings. Grades are NOT_ASKED with --no-eval-graded. The records include the second
    judge's scores. first_index: index of the first story. Raises Interrupted on `stop`."""
    config = policy.config
    prompts = [openings[i % len(openings)] for i in range(config.eval_stories)]
    on_story = graders.evaluator.send if config.eval_graded else None
    stories = rollout(policy, prompts, first_index, on_story)
    grades = [NOT_ASKED] * len(stories)
    if config.eval_graded:
        grades = graders.evaluator.collect(stop)
    difference = differences([story.text for story in stories])
    scores = [grade.score for grade in grades]
    rewards = story_rewards(config, stories, scores, difference)
    records = story_records(step, stories, grades, rewards, difference, policy.history)
    if graders.judge:
        for story in stories:
            graders.judge.send(story)
        for record, grade in zip(records, graders.judge.collect(stop), strict=True):
            record["judge"] = grade.score  # 0..1, only reported, never part of a reward
    return stories, grades, records


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
