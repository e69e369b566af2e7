"""BabyLM's reading task: how much of the variance in human reading times the student's surprisal
explains.

Data and regressions follow de Varda, Marelli & Amenta 2023 (Behavior Research Methods) as in
BabyLM's pipeline (babylm/evaluation-pipeline-2025, evaluation_pipeline/reading:
evaluation_functions.py, run.py), including its peculiarities: no space precedes a word, and the
text so far is tokenized again for each token of the word."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def evaluate_reading_times(
    student: Student, tokenizer: Tokenizer, path: str | Path
) -> dict[str, Any]:
    """Scores on reading_data.csv: eye_tracking (mean over four measures) and self_paced (with one
    word of spillover).

    A score is the percentage of the variance left by word length, frequency and position that
    surprisal explains. There is no interval, since resampling words overstates a gain that cannot
    be negative. items is the number of words; predictions holds their surprisals. Raises UserError
    for another file, or if a text exceeds the context."""
    rows, data = _read(Path(path))
    current = [(row["item"] or "None", row["word"]) for row in rows]
    previous = [(row["prev_item"], row["prev_word"]) if row["prev_item"] else None for row in rows]
    texts = list(dict.fromkeys([*current, *filter(None, previous)]))
    groups = [word_parts(tokenizer, *text) for text in texts]
    longest = max(len(ids) for group in groups for ids, _ in group)
    if longest > student.config.context:
        raise UserError(
            f"{path} has a text of {longest} tokens, and the student's context is {student.config.context}: "
            f"evaluate one that was trained with --context {longest} or more"
        )
    sums = iter(
        sum_logprobs(student, [[part] for group in groups for part in group], "reading times")
    )
    surprisal = {
        text: -sum(float(next(sums)) for _ in group)
        for text, group in zip(texts, groups, strict=True)
    }
    data["pred"] = np.array([surprisal[text] for text in current])
    data["prev_pred"] = np.array([surprisal[text] if text else np.nan for text in previous])
    pairs = zip(data["pred"].tolist(), data["prev_pred"].tolist(), strict=True)
    predictions = [
        {"id": i, "pred": now, "prev_pred": before} for i, (now, before) in enumerate(pairs)
    ]
    return {
        "eye_tracking": float(np.mean([explained(data, name, BASELINE) for name in EYES])),
        "self_paced": explained(data, SELF_PACED, SPILLOVER),
        "items": len(rows),
        "predictions": {"reading": {"predictions": predictions}},
    }


def _read(path: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    """The rows, and their numeric columns as float64 (n,), nan where empty."""
    with babylm_file(path, "BabyLM's reading_data.csv") as file:
        rows = list(csv.DictReader(file))
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("no rows, or one that is cut short")
        names = (*EYES, SELF_PACED, *BASELINE, "prev_length")
        return rows, {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def word_parts(tokenizer: Tokenizer, sentence: str, word: str) -> list[Part]:
    """One part per token of the word; their log-probabilities sum to the log-probability of `word`
    after `sentence`."""
    parts: list[Part] = []
    for id in tokenizer.encode(word):
        text = tokenizer.decode([id])
        # Decoded and encoded again as in the pipeline: a token with part of a character changes.
        target = id if not parts else tokenizer.encode(text)[0]
        context = tokenizer.encode(sentence)
        parts.append(((*context, target), len(context)))
        sentence += text
    return parts


def explained(data: dict[str, np.ndarray], outcome: str, baseline: Sequence[str]) -> float:
    """Percentage of the variance of `outcome` left by the baseline that data["pred"] explains, by
    ordinary least squares on the baseline and its pairwise interactions. data: columns (n,); rows
    with a nan are left out."""
    columns = np.array([data[name] for name in (outcome, *baseline, "pred")])
    y, *x, surprisal = columns[:, ~np.isnan(columns).any(0)]
    # spans the same space and is better conditioned
    x = [(column - column.mean()) / column.std() for column in x]
    interactions = [a * b for a, b in itertools.combinations(x, 2)]
    design = np.stack([np.ones_like(y), *x, *interactions, surprisal], axis=1)
    total = ((y - y.mean()) ** 2).sum()
    fits = (terms @ np.linalg.lstsq(terms, y, rcond=None)[0] for terms in (design[:, :-1], design))
    base, model = (1 - ((y - fit) ** 2).sum() / total for fit in fits)
    return float(100 * (model - base) / (1 - base))
