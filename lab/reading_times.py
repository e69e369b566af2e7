"""BabyLM's reading task: the percentage of the variance in human reading times that the student's
surprisal explains.

Data and regressions follow de Varda, Marelli & Amenta 2023 (Behavior Research Methods) as in
BabyLM's pipeline (babylm/evaluation-pipeline-2025, evaluation_pipeline/reading:
evaluation_functions.py, run.py), including its peculiarities: no space precedes a word, and the
text so far is tokenized again for each token of the word."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lab.pairs import babylm_file
from lab.scoring import Part, sum_logprobs
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.student.model import Student

EYES = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
BASELINE = ("Subtlex_log10", "length", "context_length")
SPILLOVER = (*BASELINE, "prev_length", "prev_pred")  # effects of the previous word
NUMERIC = (*EYES, SELF_PACED, *BASELINE, "prev_length")  # columns of the file
WordInContext: TypeAlias = tuple[str, str]  # the sentence so far, and the word


def evaluate_reading_times(
    student: Student, tokenizer: Tokenizer, path: str | Path
) -> dict[str, Any]:
    """Scores on reading_data.csv: eye_tracking (mean over four measures) and self_paced (with one
    word of spillover).

    A score is the percentage of the variance not explained by word length, frequency and position
    that surprisal explains. There is no interval, because resampling words overstates a gain that
    cannot be negative. items: number of words; predictions: surprisal of each word. Raises
    UserError for another file, or if a text exceeds the context."""
    path = Path(path)
    rows, data = read_rows(path)
    current = [(row["item"] or "None", row["word"]) for row in rows]
    previous = [(row["prev_item"], row["prev_word"]) for row in rows]
    has_previous = [text for text in previous if text[0]]
    surprisal = surprisals(student, tokenizer, current + has_previous, path)
    predictions = []
    for i in range(len(rows)):
        pred = surprisal[current[i]]
        prev_pred = surprisal.get(previous[i], math.nan)
        predictions.append({"id": i, "pred": pred, "prev_pred": prev_pred})
    for name in ("pred", "prev_pred"):
        data[name] = np.array([row[name] for row in predictions])
    eye_tracking = [explained(data, name, BASELINE) for name in EYES]
    return {
        "eye_tracking": float(np.mean(eye_tracking)),
        "self_paced": explained(data, SELF_PACED, SPILLOVER),
        "items": len(rows),
        "predictions": {"reading": {"predictions": predictions}},
    }


def read_rows(path: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    """The rows, and the numeric columns as float64 (n,), with nan for empty cells."""
    data = {}
    with babylm_file(path, "BabyLM's reading_data.csv") as file:
        rows = list(csv.DictReader(file))
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("it has no rows, or a row that is cut short")
        for name in NUMERIC:
            data[name] = np.array([float(row[name] or "nan") for row in rows])
    return rows, data


def surprisals(
    student: Student, tokenizer: Tokenizer, words: Iterable[WordInContext], path: Path
) -> dict[WordInContext, float]:
    """The surprisal of each word, in nats. Raises UserError, with the file's name, if a text
    exceeds the context."""
    surprisal = dict.fromkeys(words, 0.0)
    owners = []
    groups = []
    for sentence, word in surprisal:
        for part in word_parts(tokenizer, sentence, word):
            owners.append((sentence, word))
            groups.append([part])
    context = student.config.context
    longest = max(len(part.ids) for [part] in groups)
    if longest > context:
        raise UserError(
            f"{path} has a text of {longest} tokens, and the student's context is {context}: "
            f"evaluate a student that was trained with --context {longest} or more"
        )
    sums = sum_logprobs(student, groups, "reading times")
    for owner, logprob in zip(owners, sums, strict=True):
        surprisal[owner] -= float(logprob)
    return surprisal


def word_parts(tokenizer: Tokenizer, sentence: str, word: str) -> list[Part]:
    """One part per token of the word. The log-probabilities of the parts sum to the log-probability
    of `word` after `sentence`."""
    parts: list[Part] = []
    for id in tokenizer.encode(word):
        text = tokenizer.decode([id])
        # The text is decoded and encoded again, as in the pipeline, which changes tokens with a
        # part of a character.
        target = id if not parts else tokenizer.encode(text)[0]
        context = tokenizer.encode(sentence)
        parts.append(Part((*context, target), len(context)))
        sentence += text
    return parts


def explained(data: dict[str, np.ndarray], outcome: str, baseline: Sequence[str]) -> float:
    """Percentage of the variance of `outcome` not explained by the baseline that data["pred"]
    explains, by ordinary least squares on the baseline and its pairwise interactions. data: columns
    (n,); rows with a nan are left out."""
    columns = np.array([data[name] for name in (outcome, *baseline, "pred")])
    complete = ~np.isnan(columns).any(axis=0)
    y, *x, surprisal = columns[:, complete]
    # Standardised columns span the same space and are better conditioned.
    x = [(column - column.mean()) / column.std() for column in x]
    interactions = [a * b for a, b in itertools.combinations(x, 2)]
    terms = [np.ones_like(y), *x, *interactions]
    without = r_squared(terms, y)
    with_surprisal = r_squared([*terms, surprisal], y)
    return 100 * (with_surprisal - without) / (1 - without)


def r_squared(terms: Sequence[np.ndarray], y: np.ndarray) -> float:
    """Fraction of the variance of y (n,) that a linear combination of the terms (n,) explains."""
    design = np.stack(terms, axis=1)
    weights, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ weights
    return float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum())
