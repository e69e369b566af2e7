"""Accuracy of choosing the most probable of several texts: BLiMP and its supplement, EWoK, entity
tracking, COMPS, wug.

Accuracies agree with BabyLM's pipeline on every pair (babylm/evaluation-pipeline-2025,
babylm-org/babylm-eval of 2026, evaluation_pipeline/sentence_zero_shot: read_files.py, dataset.py,
compute_results.py, run.py). Token log-probabilities are summed, not divided by length. No token
precedes the text, so its first token is never scored. After a prefix (EWoK's context, COMPS's
concept, entity tracking's boxes) only the rest counts. A tie goes to the first option, which is
always the correct one. The average is over phenomena, not over pairs."""

import contextlib
import csv
import gzip
import itertools
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np
import torch

from lab.scoring import part, sum_logprobs
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import Z, bootstrap, wilson
from tinystory.run.errors import UserError
from tinystory.student.model import Student


@dataclass(frozen=True)
class Item:
    """Options (prefix, text), the correct one first; only the text is scored. Phenomena (`uid`) are
    averaged within a `split` first. ratio: fraction of humans who chose the first option (wug).
    whole: predictions include the prefix."""

    options: tuple[tuple[str, str], ...]
    uid: str
    split: str = ""
    ratio: float | None = None
    whole: bool = False


Scored: TypeAlias = list[tuple[Item, torch.Tensor]]


def read_items(path: str | Path) -> list[Item]:
    """The items of a .jsonl or .jsonl.gz file, or of all such in a folder. Raises UserError for an
    unknown format."""
    path = Path(path)
    files = (
        sorted(path.glob("*.jsonl")) + sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path]
    )
    items = []
    for file in files:
        name = file.name.removesuffix(".gz").removesuffix(".jsonl")
        with babylm_file(file, "BabyLM's sentence tasks") as lines:
            items += [_item(json.loads(line), name) for line in lines if line.strip()]
    return items


@contextlib.contextmanager
def babylm_file(path: Path, kind: str) -> Iterator[TextIO]:
    """Opens a text file of BabyLM's, gzipped or not. Errors in the block become a UserError."""
    broken = (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        csv.Error,
        zlib.error,
    )
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8", newline=""
        ) as file:
            yield file
    except (OSError, *broken) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be read as {kind} ({reason}): give BabyLM's own file"
        ) from error


def _item(record: dict[str, Any], file: str) -> Item:
    more: dict[str, Any] = {}
    if "sentence_good" in record:
        uid, options = (
            record.get("UID", file),
            [("", record["sentence_good"]), ("", record["sentence_bad"])],
        )
    elif "options" in record:
        uid, options = (
            f"{file}_{record['numops']}_ops",
            [(record["input_prefix"], text) for text in record["options"]],
        )
        more = {"split": file}
    elif "Target1" in record:
        uid, options = (
            record["Domain"],
            [(record["Context1"], f" {record[name]}") for name in ("Target1", "Target2")],
        )
    elif "property_phrase" in record:
        prefixes = record["prefix_acceptable"], record["prefix_unacceptable"]
        uid, options = (
            file.removeprefix("comps_"),
            [(f"{prefix} ", record["property_phrase"]) for prefix in prefixes],
        )
        uid, more = uid.replace("-", "_"), {"whole": True}
    else:
        uid, options = file, [("", text) for text in record["sentences"].split("\t")]
        more = {"ratio": float(record["ratio"])}
    if len(options) < 2 or not all(
        isinstance(text, str) for text in (uid, *itertools.chain(*options))
    ):
        raise ValueError("an item needs two texts or more")
    return Item(tuple(options), uid, **more)


def task_items(path: str | Path, *, wug: bool) -> list[Item]:
    """The items of the wug test, or of any other task. Raises UserError for those of the other
    kind."""
    items = read_items(path)
    if any((item.ratio is not None) != wug for item in items):
        raise UserError(
            f"{path} is not of this task: --wug takes the wug test, and nothing else does"
        )
    return items


def score_items(
    student: Student, tokenizer: Tokenizer, path: str | Path, *, wug: bool, fewest: int
) -> tuple[int, Scored]:
    """The number of items, and those that fit the context, each with its options' log-probabilities
    after their common prefix, (options,) float64, in nats. Raises UserError for another task's
    items, or if fewer than `fewest` fit."""
    items = task_items(path, wug=wug)
    groups = [[part(tokenizer, *option) for option in item.options] for item in items]
    fits = [max(len(ids) for ids, _ in group) <= student.config.context for group in groups]
    if sum(fits) < fewest:
        raise UserError(
            f"{path} holds {len(items)} items, and {sum(fits)} of them fit the student's context of "
            f"{student.config.context} tokens: give .jsonl or .jsonl.gz files of which {fewest} or more fit"
        )
    sums = sum_logprobs(student, list(compress(groups, fits)), Path(path).name)
    return len(items), list(zip(compress(items, fits), sums, strict=True))


def predictions(results: Scored, uid: str = "") -> dict[str, Any]:
    """The chosen options in BabyLM's format, {uid: {"predictions": [{"id", "pred"}, ...]}}. The wug
    tests have the given `uid`, and "prob", the first option's probability, in float32 as in the
    pipeline."""
    table: dict[str, Any] = {}
    for item, logprobs in results:
        name = uid or item.uid
        rows = table.setdefault(name, {"predictions": []})["predictions"]
        prefix, text = item.options[int(logprobs.argmax())]
        prob = {} if item.ratio is None else {"prob": float(logprobs.float().softmax(0)[0])}
        rows.append({"id": f"{name}_{len(rows)}", "pred": prefix * item.whole + text} | prob)
    return table


def evaluate_pairs(student: Student, tokenizer: Tokenizer, path: str | Path) -> dict[str, Any]:
    """Accuracy on BLiMP, its supplement, EWoK, COMPS or entity tracking.

    Returns accuracy and ci (95 % interval), in per cent, averaged over phenomena as in the
    pipeline; items (scored) and too_long (left out, since they exceed the context); phenomena {uid:
    {accuracy, ci (Wilson), correct, total}}; predictions. Raises UserError if no item fits, or for
    the files of the wug test."""
    count, scored = score_items(student, tokenizer, path, wug=False, fewest=1)
    answers: dict[tuple[str, str], list[bool]] = defaultdict(list)  # by split and phenomenon
    for item, logprobs in scored:
        # the first of equal ones, as in the pipeline
        answers[item.split, item.uid].append(int(logprobs.argmax()) == 0)
    splits = Counter(split for split, _ in answers)
    weights = [1 / (len(splits) * splits[split]) for split, _ in answers]
    counts = [(sum(correct), len(correct)) for correct in answers.values()]
    accuracy, ci = weighted(counts, weights)
    return {
        "accuracy": 100 * accuracy,
        "ci": _percent(ci),
        "items": len(scored),
        "too_long": count - len(scored),
        "phenomena": {
            uid: dict(
                accuracy=100 * right / n, ci=_percent(wilson(right, n)), correct=right, total=n
            )
            for (_, uid), (right, n) in zip(answers, counts, strict=True)
        },
        "predictions": predictions(scored),
    }


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def evaluate_wug(
    student: Student, tokenizer: Tokenizer, path: str | Path, name: str = "wug_adj"
) -> dict[str, Any]:
    """Spearman's rank correlation (-1..1) of the student's preference for the first form (softmax
    of the log-probabilities) with the fraction of humans who chose it; ci (bootstrap), items,
    too_long and predictions under `name`. Raises UserError for files of another task, or if fewer
    than three items fit."""
    count, results = score_items(student, tokenizer, path, wug=True, fewest=3)
    # In float32, as in the pipeline, where preferences near 0 and 1 become ties.
    model = torch.stack([logprobs.float().softmax(0)[0] for _, logprobs in results]).numpy()
    human = np.array([item.ratio for item, _ in results])
    return {
        "correlation": spearman(model, human),
        "ci": bootstrap(lambda rows: spearman(model[rows], human[rows]), len(results)),
        "items": len(results),
        "too_long": count - len(results),
        "predictions": predictions(results, name),
    }


def weighted(
    counts: Sequence[tuple[int, int]], weights: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The sum of weight * correct / total over independent proportions (correct, total), and its
    normal interval. The variance counts two more successes and failures each (Agresti and Coull),
    so that no proportion is certain."""
    correct, total = np.array(counts, dtype=float).T
    mean, p = float(weights @ (correct / total)), (correct + 2) / (total + 4)
    half = Z * math.sqrt(np.square(weights) @ (p * (1 - p) / (total + 4)))
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of (n,) and (n,). Ties get their mean rank; nan if all values of
    either are equal."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    a, b = (rank - rank.mean() for rank in ranks)
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")
