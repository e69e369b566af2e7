"""How much of people's reading times does the student's surprisal explain? BabyLM's reading task.

Data and regressions after de Varda, Marelli & Amenta 2023 (Behavior Research Methods), as BabyLM's pipeline takes them
(babylm/evaluation-pipeline-2025, evaluation_pipeline/reading: evaluation_functions.py, run.py), its peculiarities too:
a word is read with no space before it, and what the text is so far is made into tokens anew for each of the word's.
"""

import csv
import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinystory.data.tokenizer import Tokenizer
from tinystory.errors import UserError
from tinystory.evaluate.scoring import Part, sum_logprobs
from tinystory.student.model import Student

EYES = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
BASELINE = ("Subtlex_log10", "length", "context_length")
SPILLOVER = (*BASELINE, "prev_length", "prev_pred")  # what the word before leaves over


def evaluate_reading(student: Student, tokenizer: Tokenizer, path: str | Path) -> dict[str, Any]:
    """Of reading_data.csv: eye_tracking, the mean over four measures, and self_paced, with one word of spillover.

    Each is in per cent: how much of the variance that word length, frequency and place leave unexplained the surprisal
    explains. There is no interval: resampled words overstate a gain that cannot be negative. items: words. Raises
    UserError for a file that is not BabyLM's.
    """
    rows = _read(Path(path))
    texts = [(row["item"] or "None", row["word"]) for row in rows]
    before = [(row["prev_item"], row["prev_word"]) if row["prev_item"] else None for row in rows]
    asked = list(dict.fromkeys([*texts, *filter(None, before)]))
    groups = [pieces(tokenizer, *each) for each in asked]
    longest = max(len(ids) for group in groups for ids, _ in group)
    if longest > student.config.context:
        raise UserError(f"{path} has a text of {longest} tokens, and the student reads {student.config.context}")
    flat = sum_logprobs(student, [[p] for group in groups for p in group], "reading times")
    sums = iter(float(each) for each in flat)
    surprisal = {each: -sum(itertools.islice(sums, len(group))) for each, group in zip(asked, groups, strict=True)}

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name] or "nan") for row in rows])

    data = {name: column(name) for name in (*EYES, SELF_PACED, *BASELINE, "prev_length")}
    data["pred"] = np.array([surprisal[text] for text in texts])
    data["prev_pred"] = np.array([surprisal[text] if text else np.nan for text in before])

    return {
        "eye_tracking": float(np.mean([explained(data, name, BASELINE) for name in EYES])),
        "self_paced": explained(data, SELF_PACED, SPILLOVER),
        "items": len(rows),
    }


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
            needed = ("item", "word", "prev_item", "prev_word", *EYES, SELF_PACED, *BASELINE, "prev_length")
            if not rows or any(row[name] is None for row in rows for name in needed):
                raise ValueError("no rows, or one that is cut short")
            return rows
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, csv.Error, EOFError) as error:
        raise UserError(f"{path} is not BabyLM's reading_data.csv ({error!r})") from error


def pieces(tokenizer: Tokenizer, sentence: str, word: str) -> list[Part]:
    """What is asked of the student for the log-probability of `word` after `sentence`: one part a token of the word."""
    parts = []
    for id in tokenizer.encode(word):
        text = tokenizer.decode([id])
        # The first token of its text: another one where a character is cut in two.
        target = id if not parts else tokenizer.encode(text)[0]
        context = tokenizer.encode(sentence)
        parts.append(((*context, target), len(context)))
        sentence += text
    return parts


def explained(data: dict[str, np.ndarray], outcome: str, baseline: Sequence[str]) -> float:
    """Per cent of the variance of `outcome` that the baseline leaves and the surprisal "pred" explains, by ordinary
    least squares with the products of each two of the baseline. Rows with a gap are left out."""
    columns = [data[name] for name in (outcome, *baseline, "pred")]
    there = ~np.isnan(columns).any(0)
    y, *x, surprisal = (column[there] for column in columns)
    x = [(each - each.mean()) / each.std() for each in x]  # of the same span, and better conditioned
    products = [a * b for a, b in itertools.combinations(x, 2)]
    design = np.stack([np.ones_like(y), *x, *products, surprisal], axis=1)
    total = ((y - y.mean()) ** 2).sum()
    left = [((y - part @ np.linalg.lstsq(part, y, rcond=None)[0]) ** 2).sum() for part in (design[:, :-1], design)]
    base, model = (1 - each / total for each in left)
    return float(100 * (model - base) / (1 - base))
