"""Evaluation during interaction: stories to held-out openings, what they earn, and which checkpoint is the best."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.evaluate.stories import distinct_ngrams, mean_of
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import cluster_sizes, differences, story_rewards
from tinystory.run import distributed
from tinystory.run.device import Stop
from tinystory.run.errors import Interrupted, UserError
from tinystory.run.folder import EVALUATIONS, SAMPLES, Record, RunLog, atomic_write, read_records
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.student.generate import Story
from tinystory.teacher.grade import Grade, score_means
from tinystory.teacher.grader import Grader

FIRST_INDEX = 10**9  # of an evaluation's stories: the same draws each time, and none of training's


def due(config: InteractConfig, step: int) -> bool:
    """Whether the policy is evaluated after this many steps, if the run gets so far."""
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


@dataclass
class Evaluator:
    """Evaluates the policy on held-out openings, and keeps the best student as the checkpoint `best`."""

    config: InteractConfig
    policy: Policy
    openings: Openings
    grader: Grader
    log: RunLog
    stop: Stop

    def done(self, step: int) -> bool:
        """Whether the evaluation after this many steps is on record."""
        records = self.log.folder / EVALUATIONS
        return distributed.rank0_value(lambda: any(record["step"] == step for record in read_records(records)))

    def evaluate(self, state: RunState) -> dict[str, Any]:
        """The metrics of an evaluation, whose words are spent. Raises Interrupted if the run is asked to stop."""
        held_out, folder = self.openings.held_out, self.log.folder
        prompts = [held_out[i % len(held_out)] for i in range(self.config.eval_stories)]
        stories = rollout(self.policy, prompts, FIRST_INDEX, self.grader.send)
        grades = distributed.rank0_value(lambda: self.grader.collect(self.stop))
        state.spend(stories, sum(grade.reply_words for grade in grades))
        rewards = story_rewards(self.config, stories, [grade.score for grade in grades])
        records = story_records(state.step, stories, grades, rewards)
        self.log.evaluations(records)
        if distributed.rank0_value(lambda: is_best(read_records(folder / EVALUATIONS), state.step)):
            state.best_step = state.step
            self.policy.save(folder / "checkpoints" / checkpoint.BEST, state, replace=True)
        means = {"reward": reward_mean(records), "score_mean": score_means(grades)["score_mean"]}
        return {f"held_out_{name}": value for name, value in (means | story_means(records)).items()}

    def evaluate_if_due(self, state: RunState) -> tuple[dict[str, Any], UserError | Interrupted | None]:
        """The metrics, and a failure of the teacher or Interrupted, to be raised once the step is logged and saved."""
        try:
            return self.evaluate(state) if due(self.config, state.step) else {}, None
        except (UserError, Interrupted) as error:
            return {}, error


def story_records(
    step: int, stories: Sequence[Story], grades: Sequence[Grade], rewards: Sequence[float | None]
) -> list[Record]:
    """The lines of stories.jsonl and evaluations.jsonl."""
    return [
        dict(
            step=step, index=story.index, opening=story.opening, story=story.text, reply=grade.reply_or_error,
            scores=grade.scores, reward=reward, words=story.words, ended=story.ended,
        )
        for story, grade, reward in zip(stories, grades, rewards, strict=True)
    ]  # fmt: skip


def story_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Mean words, endings and difference from the other stories; distinct_4 and clusters over all of them."""
    texts = [record["story"] for record in records]
    return {
        "length_mean": fmean(record["words"] for record in records),
        "ended": fmean(record["ended"] == "eos" for record in records),
        "diversity_mean": fmean(differences(texts)),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    }


def reward_mean(records: Sequence[Record]) -> float | None:
    """Over the stories that have a reward; None if none has."""
    return mean_of(record["reward"] for record in records if record["reward"] is not None)


def is_best(records: Iterable[Record], step: int) -> bool:
    """Whether the evaluation at `step` earned as much as any, within a standard error of the difference.

    records: of evaluations.jsonl. An evaluation's few stories tell no more than that, and the later student has learned
    from more of them; so a new one need not be the highest, but may not be clearly lower either."""
    rewards: dict[int, dict[int, float]] = {}  # by step and index: one index is one opening
    for record in records:
        if record["reward"] is not None:
            rewards.setdefault(record["step"], {})[record["index"]] = record["reward"]
    if step not in rewards:
        return False
    highest = max(rewards.values(), key=lambda evaluation: fmean(evaluation.values()))
    deficits = [highest[index] - reward for index, reward in rewards[step].items() if index in highest]
    error = stdev(deficits) / math.sqrt(len(deficits)) if len(deficits) > 1 else 0.0
    return bool(deficits) and fmean(deficits) <= error


def write_samples(folder: Path, best_step: int) -> str:
    """Write samples.jsonl, the evaluations before training and of `best`. Returns a summary for the terminal: a story
    before and after, and what the two evaluations measured."""
    records = list(read_records(folder / EVALUATIONS))
    before, after = ([record for record in records if record["step"] == step] for step in (0, best_step))
    samples = [{"when": "before"} | record for record in before] + [{"when": "after"} | record for record in after]
    atomic_write(folder / SAMPLES, "".join(json.dumps(record) + "\n" for record in samples))
    if not before or not after:  # evaluations.jsonl can have lost one
        return ""
    lines = []
    for when, record in (("before", before[0]), ("after", after[0])):
        text = printable(f"{record['opening']} {record['story']}")
        lines.append(f"\n{when}, scored {record['scores']}:\n{text}")
    lines.append(f"\n{len(before)} evaluation stories, before and after step {best_step}, the best:")
    values: list[dict[str, Any]] = [{"reward": reward_mean(side)} | story_means(side) for side in (before, after)]
    for name in ("reward", "ended", "distinct_4", "story_clusters"):
        lines.append(f"  {name:14} {values[0][name] or 0:.3g} -> {values[1][name] or 0:.3g}")
    return "\n".join(lines)
