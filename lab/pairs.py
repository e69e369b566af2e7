"""Accuracy on tasks of choosing the most probable of several texts: BLiMP and its supplement, EWoK,
entity tracking, COMPS, wug.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from torch import Tensor

from lab.intervals import bootstrap
from lab.scoring import part, sum_logprobs
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import Z, wilson
from tinystory.run.errors import UserError
from tinystory.student.model import Student

# Exceptions that reading a file of another format can raise.
BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    csv.Error,
    zlib.error,
)


@dataclass(frozen=True)
class Item:
    """An item of a task. options: pairs (prefix, text), the correct one first; only the text is
    scored. Phenomena (`uid`) are first averaged within a `split`. ratio: fraction of humans who
    chose the first option (wug). whole: whether predictions include the prefix."""

    options: list[tuple[str, str]]
    uid: str
    split: str = ""
    ratio: float | None = None
    whole: bool = False


class Scored(NamedTuple):
    """An item with the log-probabilities of its options after their common prefix: (options,)
    float64, in nats."""

    item: Item
    logprobs: Tensor


def read_items(path: str | Path) -> list[Item]:
    """The items of a .jsonl or .jsonl.gz file, or of all such files in a folder. Raises UserError
    for an unknown format."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl")) + sorted(path.glob("*.jsonl.gz"))
    items = []
    for file in files:
        name = file.name.removesuffix(".gz").removesuffix(".jsonl")
        with babylm_file(file, "BabyLM's sentence tasks") as lines:
            for line in lines:
                if line.strip():
                    items.append(read_item(json.loads(line), name))
    return items


@contextlib.contextmanager
def babylm_file(path: Path, kind: str) -> Iterator[TextIO]:
    """Yields a text file of BabyLM, gzipped or not. Errors in the block become a UserError."""
    open_text: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be read as {kind} ({reason}): give BabyLM's own file"
        ) from error


def read_item(record: dict[str, Any], file: str) -> Item:
    """An item of any task. file: name of the item's file, without an ending."""
    if "sentence_good" in record:  # BLiMP and its supplement
        options = [("", record["sentence_good"]), ("", record["sentence_bad"])]
        item = Item(options, record.get("UID", file))
    elif "options" in record:  # entity tracking
        options = [(record["input_prefix"], text) for text in record["options"]]
        item = Item(options, f"{file}_{record['numops']}_ops", split=file)
    elif "Target1" in record:  # EWoK
        context = record["Context1"]
        options = [(context, f" {record['Target1']}"), (context, f" {record['Target2']}")]
        item = Item(options, record["Domain"])
    elif "property_phrase" in record:  # COMPS
        prefixes = [record["prefix_acceptable"], record["prefix_unacceptable"]]
        options = [(f"{prefix} ", record["property_phrase"]) for prefix in prefixes]
        uid = file.removeprefix("comps_").replace("-", "_")
        item = Item(options, uid, whole=True)
    else:  # wug
        options = [("", text) for text in record["sentences"].split("\t")]
        item = Item(options, file, ratio=float(record["ratio"]))
    texts = [item.uid, *itertools.chain(*options)]
    if len(options) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError("an item needs two texts or more")
    return item


def task_items(path: str | Path, *, wug: bool) -> list[Item]:
    """The items of the wug test, if `wug`, or of any other task. Raises UserError if the file is of
    the other kind."""
    items = read_items(path)
    if any((item.ratio is not None) != wug for item in items):
        raise UserError(
            f"{path} is of another task: give wug tests to --wug or --wug-past, and other tasks to their "
            "own options"
        )
    return items


def score_items(
    student: Student, tokenizer: Tokenizer, path: str | Path, *, wug: bool, fewest: int
) -> tuple[list[Scored], int]:
    """The scored items that fit the student's context, and the number of items that do not fit.
    Raises UserError for items of another task, or if fewer than `fewest` fit."""
    context = student.config.context
    items = task_items(path, wug=wug)
    fitting = []
    groups = []
    for item in items:
        parts = [part(tokenizer, prefix, text) for prefix, text in item.options]
        if max(len(option.ids) for option in parts) <= context:
            fitting.append(item)
            groups.append(parts)
    if len(fitting) < fewest:
        raise UserError(
            f"{path} holds {len(items)} items, and {len(fitting)} of them fit the student's context of "
            f"{context} tokens: give .jsonl or .jsonl.gz files with {fewest} items that fit, or more"
        )
    sums = sum_logprobs(student, groups, Path(path).name)
    scored = [Scored(item, logprobs) for item, logprobs in zip(fitting, sums, strict=True)]
    return scored, len(items) - len(fitting)


def predictions(scored: Sequence[Scored], uid: str = "") -> dict[str, Any]:
    """The chosen options in BabyLM's format, {uid: {"predictions": [{"id", "pred"}, ...]}}. The wug
    tests have the given `uid` and also "prob", the probability of the first option (in float32, as
    in the pipeline)."""
    table: dict[str, Any] = {}
    for item, logprobs in scored:
        name = uid or item.uid
        rows = table.setdefault(name, {"predictions": []})["predictions"]
        prefix, text = item.options[int(logprobs.argmax())]
        pred = prefix + text if item.whole else text
        row: dict[str, Any] = {"id": f"{name}_{len(rows)}", "pred": pred}
        if item.ratio is not None:
            row["prob"] = first_probability(logprobs)
        rows.append(row)
    return table


def first_probability(logprobs: Tensor) -> float:
    """The probability of the first option. It is computed in float32, as in the pipeline, so
    preferences near 0 and 1 become ties."""
    return float(logprobs.float().softmax(0)[0])


def evaluate_pairs(student: Student, tokenizer: Tokenizer, path: str | Path) -> dict[str, Any]:
    """Accuracy on BLiMP, its supplement, EWoK, COMPS or entity tracking.

    Returns accuracy and ci (95 % interval), in per cent, averaged over phenomena as in the
    pipeline; items (number of scored items) and too_long (number of items left out because they
    exceed the context); phenomena {uid: {accuracy, ci (Wilson), correct, total}}; predictions.
    Raises UserError if no item fits, or for a file of the wug test."""
    scored, too_long = score_items(student, tokenizer, path, wug=False, fewest=1)
    answers: dict[tuple[str, str], list[bool]] = defaultdict(list)  # by split and phenomenon
    for item, logprobs in scored:
        chosen = int(logprobs.argmax())  # the first of equal ones, as in the pipeline
        answers[item.split, item.uid].append(chosen == 0)

    split_sizes = Counter(split for split, _ in answers)
    counts = []
    weights = []
    phenomena = {}
    for (split, uid), is_right in answers.items():
        correct = sum(is_right)
        total = len(is_right)
        counts.append((correct, total))
        weights.append(1 / (len(split_sizes) * split_sizes[split]))
        phenomena[uid] = {
            "accuracy": 100 * correct / total,
            "ci": percent(wilson(correct, total)),
            "correct": correct,
            "total": total,
        }
    accuracy, ci = weighted(counts, weights)
    return {
        "accuracy": 100 * accuracy,
        "ci": percent(ci),
        "items": len(scored),
        "too_long": too_long,
        "phenomena": phenomena,
        "predictions": predictions(scored),
    }


def percent(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return 100 * low, 100 * high


def evaluate_wug(
    student: Student, tokenizer: Tokenizer, path: str | Path, name: str = "wug_adj"
) -> dict[str, Any]:
    """Spearman's rank correlation (-1..1) between the student's preference for the first form
    (softmax of the log-probabilities) and the fraction of humans who chose the first form; ci
    (bootstrap), items, too_long, and predictions under `name`. Raises UserError for files of
    another task, or if fewer than three items fit."""
    scored, too_long = score_items(student, tokenizer, path, wug=True, fewest=3)
    model = np.array([first_probability(logprobs) for _, logprobs in scored], dtype=np.float32)
    human = np.array([item.ratio for item, _ in scored])
    return {
        "correlation": spearman(model, human),
        "ci": bootstrap(lambda rows: spearman(model[rows], human[rows]), len(scored)),
        "items": len(scored),
        "too_long": too_long,
        "predictions": predictions(scored, name),
    }


def weighted(
    counts: Sequence[tuple[int, int]], weights: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The sum of weight * correct / total over independent proportions (correct, total), and the
    normal interval of this sum. The variance counts two more successes and two more failures
    (Agresti and Coull), so that no proportion is certain."""
    correct, total = np.array(counts, dtype=float).T
    mean = float(weights @ (correct / total))
    p = (correct + 2) / (total + 4)
    variance = np.square(weights) @ (p * (1 - p) / (total + 4))
    half = Z * math.sqrt(variance)
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x (n,) and y (n,); nan if all values of x or of y are
    equal."""
    a = centred_ranks(x)
    b = centred_ranks(y)
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def centred_ranks(values: np.ndarray) -> np.ndarray:
    """(n,): ranks of the values minus the mean rank. Equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    ranks = mean_ranks[inverse]
    return ranks - ranks.mean()
