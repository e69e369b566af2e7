"""Evaluation during interaction: rewards of stories on held-out openings, and the choice of the
best checkpoint."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.builtin import dull
from tinystory.data.openings import Openings
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams, mean_of
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import differences, story_rewards
from tinystory.run import distributed
from tinystory.run.errors import Stop
from tinystory.run.folder import EVALUATIONS, SAMPLES, Record, atomic_write, read_records
from tinystory.run.log import RunLog
from tinystory.student import checkpoint
from tinystory.student.generate import Story
from tinystory.teacher.grade import Grade, Grader, score_means

FIRST_INDEX = 10**9  # evaluations draw the same random numbers each time, and none of training's


def due(config: InteractConfig, step: int) -> bool:
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


@dataclass
class Evaluator:
    """Evaluates the policy on held-out openings, and keeps the best student as the checkpoint
    `best`."""

    config: InteractConfig
    policy: Policy
    openings: Openings
    grader: Grader
    log: RunLog
    stop: Stop

    def done(self, step: int) -> bool:
        records = self.log.folder / EVALUATIONS
        return distributed.rank0_value(
            lambda: any(record["step"] == step for record in read_records(records))
        )

    def evaluate(self, state: RunState) -> dict[str, Any]:
        """Metrics on the held-out openings. The words count against the budget. Raises
        Interrupted."""
        folder = self.log.folder
        prompts = list(islice(cycle(self.openings.held_out), self.config.eval_stories))
        stories = rollout(self.policy, prompts, FIRST_INDEX, self.send)
        grades = distributed.rank0_value(lambda: self.grader.collect(self.stop))
        state.spend(stories, sum(grade.reply_words for grade in grades))
        rewards = story_rewards(self.config, stories, [grade.score for grade in grades])
        records = story_records(
            state.step, stories, grades, rewards, mixed=has_dull_tellers(self.policy.history)
        )
        metrics = {"reward": reward_mean(records), "score_mean": score_means(grades)["score_mean"]}
        self.log.evaluations(records)
        if distributed.rank0_value(lambda: is_best(read_records(folder / EVALUATIONS), state.step)):
            state.best_step = state.step
            self.policy.save(folder / "checkpoints" / checkpoint.BEST, state, replace=True)
        return {
            f"held_out_{name}": value for name, value in (metrics | story_means(records)).items()
        }

    def send(self, story: Story) -> None:
        self.grader.send(story.index, story.opening, story.text, story.tokens.tolist())


def has_dull_tellers(facts: Mapping[str, Any]) -> bool:
    """Whether this history of a student names the built-in dull tellers, whose sentences are
    known."""
    return "dull" in (facts.get("corpus") or ())


def story_records(
    step: int,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    rewards: Sequence[float | None],
    mixed: bool = False,
    predicted: Sequence[float | None] = (),
) -> list[Record]:
    """Lines of stories.jsonl and evaluations.jsonl. mixed: with the teller's kind. predicted: from
    the score model."""
    return [
        {
            "step": step,
            "index": story.index,
            "opening": story.opening,
            "story": story.text,
            "reply": grade.reply or grade.error or "",
            "scores": grade.scores,
            "reward": reward,
            "words": story.words,
            "ended": story.ended,
        }
        | ({"predicted": predicted[i]} if predicted else {})
        | ({"teller": dull.kind_of(story.text)} if mixed else {})
        for i, (story, grade, reward) in enumerate(zip(stories, grades, rewards, strict=True))
    ]


def story_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Means of length, endings and diversity; distinct_4 and clusters over all stories; the
    fraction of each teller."""
    texts = [record["story"] for record in records]
    tellers = [record["teller"] for record in records if "teller" in record]
    return {
        "length_mean": fmean(record["words"] for record in records),
        "ended": fmean(record["ended"] == "eos" for record in records),
        "diversity_mean": fmean(differences(texts)),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    } | {f"teller_{kind}": tellers.count(kind) / len(tellers) for kind in dull.KINDS if tellers}


def reward_mean(records: Sequence[Record]) -> float | None:
    """None if no story has a reward."""
    return mean_of(record["reward"] for record in records)


def is_best(records: Iterable[Record], step: int) -> bool:
    """Whether the evaluation at `step` in evaluations.jsonl has the highest mean reward so far,
    within one standard error: a smaller difference is noise, and the later student is preferred, as
    it has learned from more stories."""
    # by step, then by index, which always has the same opening
    rewards: dict[int, dict[int, float]] = {}
    for record in records:
        if record["reward"] is not None:
            rewards.setdefault(record["step"], {})[record["index"]] = record["reward"]
    if step not in rewards:
        return False
    highest = max(rewards.values(), key=lambda evaluation: fmean(evaluation.values()))
    deficits = [
        highest[index] - reward for index, reward in rewards[step].items() if index in highest
    ]
    error = stdev(deficits) / math.sqrt(len(deficits)) if len(deficits) > 1 else 0.0
    return bool(deficits) and fmean(deficits) <= error


def write_samples(folder: Path, best_step: int) -> None:
    """Write samples.jsonl: the stories of the evaluations before training and of `best`."""
    records = list(read_records(folder / EVALUATIONS))
    before, after = (
        [record for record in records if record["step"] == step] for step in (0, best_step)
    )
    samples = [{"when": "before"} | record for record in before] + [
        {"when": "after"} | record for record in after
    ]
    atomic_write(folder / SAMPLES, "".join(json.dumps(record) + "\n" for record in samples))
