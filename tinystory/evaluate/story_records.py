"""Records of stories, for stories.jsonl and evaluations.jsonl, and the means over them."""

from collections.abc import Mapping, Sequence
from statistics import StatisticsError, correlation, fmean
from typing import Any

from tinystory.data.builtin import dull
from tinystory.evaluate.intervals import mean_of
from tinystory.evaluate.stories import cluster_sizes, distinct_ngrams
from tinystory.run.records import Record
from tinystory.student.generate import Story
from tinystory.teacher.grade import NOT_ASKED, Grade, highest_score, score_means


def learned_dull_text(history: Mapping[str, Any]) -> bool:
    """Whether a student with this history was trained on the built-in dull text, so that the style
    of a story can be recognised (`style` in the records)."""
    return "dull" in (history.get("corpus") or ())


def story_records(
    step: int,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    rewards: Sequence[float | None],
    differences: Sequence[float],
    history: Mapping[str, Any],
) -> list[Record]:
    """Records of stories for stories.jsonl and evaluations.jsonl. differences: from
    `rl.reward.differences`. history: the student's training history."""
    records = []
    rows = zip(stories, grades, rewards, differences, strict=True)
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
        if grade.by_word:
            record["by_word"] = list(grade.by_word)
        if learned_dull_text(history):
            record["style"] = dull.style_of(story.text)
        records.append(record)
    return records


def story_means(records: Sequence[Record]) -> dict[str, float | None]:
    """Measures of recorded stories: mean length, fraction ended, mean diversity; distinct_4 and
    number of clusters over all stories; the fraction of the stories in each style."""
    texts = [record["story"] for record in records]
    means: dict[str, float | None] = {
        "length_mean": fmean(record["words"] for record in records),
        "ended": fmean(record["ended"] == "eos" for record in records),
        "diversity_mean": mean_of(record.get("difference") for record in records),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    }
    styles = [record["style"] for record in records if "style" in record]
    if styles:
        for style in dull.STYLES:
            means[f"style_{style}"] = styles.count(style) / len(styles)
    return means


def step_means(
    stories: Sequence[Story], grades: list[Grade], records: Sequence[Record]
) -> dict[str, float | None]:
    """Metrics of a step's stories: `score_means`, `story_means`, `score_relations`, and:

    entropy: mean entropy per story of the sampling distributions, in nats, summed over the tokens.
    unscored: number of stories that were sent to the teacher and have no score."""
    scores = [grade.score for grade in grades]
    entropies = [float(story.entropies.sum()) for story in stories]
    means = score_means(grades) | story_means(records) | score_relations(stories, scores)
    unscored = scores.count(None) - grades.count(NOT_ASKED)
    return means | {"entropy": fmean(entropies), "unscored": unscored}


def score_relations(
    stories: Sequence[Story], scores: Sequence[float | None]
) -> dict[str, float | None]:
    """scored: number of stories with a score. score_length, score_logprob: Pearson's correlation,
    over these stories, of the score with the number of words, and with the mean log-probability per
    token as sampled; None if undefined."""
    known_scores = []
    words = []
    mean_logprobs = []
    for story, score in zip(stories, scores, strict=True):
        if score is not None:
            known_scores.append(score)
            words.append(story.words)
            mean_logprobs.append(float(story.logprobs.mean()))
    return {
        "scored": len(known_scores),
        "score_length": correlation_or_none(known_scores, words),
        "score_logprob": correlation_or_none(known_scores, mean_logprobs),
    }


def correlation_or_none(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than two values, or if all x or all y are equal."""
    try:
        return correlation(x, y)
    except StatisticsError:
        return None


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
    """The score of a story as shown to users, from 0 to `highest_score`; None without a score."""
    score = record["score"]
    return None if score is None else float(score * highest_score(record["scores"]))


def reward_mean(records: Sequence[Record]) -> float | None:
    """Mean reward of the stories that have a reward; None if no story has one."""
    return mean_of(record["reward"] for record in records)
