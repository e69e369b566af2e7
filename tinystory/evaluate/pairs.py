"""Which of several texts does the student find most probable? BLiMP, its supplement, entity tracking and the wug test.

The definitions are those of BabyLM's pipeline (babylm/evaluation-pipeline-2025, evaluation_pipeline/sentence_zero_shot:
read_files.py, dataset.py, compute_results.py, run.py), so that accuracies agree on every pair: token log-probabilities
are summed, not divided by length; no token precedes the text, so its first token is never scored; in entity tracking
only the part after the prefix counts; a tie goes to the first option, which is always the correct one; the average is
taken over phenomena, not over pairs.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import bootstrap, spearman, weighted, wilson
from tinystory.evaluate.scoring import part, sum_logprobs
from tinystory.run.errors import UserError
from tinystory.student.model import Student


@dataclass(frozen=True)
class Item:
    """Options to choose from, the correct one first, each read after `prefix`.

    uid: the phenomenon; split: phenomena are first averaged within a split; groups: further categories {kind: name} to
    report it under; ratio: the fraction of people who chose the first option (wug test only)."""

    prefix: str
    options: tuple[str, ...]
    uid: str
    split: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    ratio: float | None = None


def read_items(path: str | Path) -> list[Item]:
    """The items of a .jsonl or .jsonl.gz file, or of all such files in a folder, in BabyLM's formats.

    Raises UserError if there are none or if a line has an unknown format.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) + sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path]
    items = [item for file in files for item in _read(file)]
    if not items:
        raise UserError(f"{path} holds no evaluation items: give a .jsonl (or .jsonl.gz) file, or a folder of them")
    return items


def _read(file: Path) -> Iterator[Item]:
    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    where = str(file)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number},"
                if line.strip():
                    yield _item(json.loads(line), name)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(
            f"{where} is not an item of BLiMP, entity tracking or the wug test ({error!r}): give BabyLM's own files"
        ) from error


def _item(record: dict[str, Any], file: str) -> Item:
    if "sentence_good" in record:
        options = (record["sentence_good"], record["sentence_bad"])
        if "field" not in record:  # the supplement's files name no field, and most of them no phenomenon
            item = Item("", options, record.get("UID", file))
        else:
            groups = {
                "field": record["field"].replace("syntax_semantics", "syntax/semantics"),
                "linguistics_term": record["linguistics_term"],
            }
            item = Item("", options, record["UID"], groups=groups)
    elif "options" in record:
        item = Item(record["input_prefix"], tuple(record["options"]), f"{file}_{record['numops']}_ops", split=file)
    else:
        item = Item("", tuple(record["sentences"].split("\t")), file, ratio=float(record["ratio"]))
    if len(item.options) < 2 or not all(isinstance(text, str) for text in (item.prefix, item.uid, *item.options)):
        raise ValueError("an item needs two texts or more")
    return item


def scores(student: Student, tokenizer: Tokenizer, items: Sequence[Item], desc: str) -> list[torch.Tensor | None]:
    """Per item, the log-probabilities of its options after their common prefix, in nats: (options,) float64.

    None for an item that does not fit the student's context. desc: label of the progress bar."""
    groups = [[part(tokenizer, item.prefix, option) for option in item.options] for item in items]
    fits = [max(len(ids) for ids, _ in group) <= student.config.context for group in groups]
    sums = iter(sum_logprobs(student, [group for group, fit in zip(groups, fits, strict=True) if fit], desc))
    return [next(sums) if fit else None for fit in fits]


def evaluate_pairs(student: Student, tokenizer: Tokenizer, path: str | Path) -> dict[str, Any]:
    """Accuracy on BLiMP, its supplement or entity tracking.

    Returns a dict: accuracy and ci (95 % interval), in per cent, averaged over phenomena as in the pipeline; items, the
    number scored; too_long, the number left out because they do not fit the student's context; phenomena {uid: row} and
    groups {"field": {name: row}, ...}, where a row holds accuracy, ci (Wilson), correct and total. Raises UserError if
    no item fits, or for the files of the wug test.
    """
    items = read_items(path)
    if any(item.ratio is not None for item in items):
        raise UserError(f"{path} holds the wug test, which has no right answers: give it as --wug")
    found = scores(student, tokenizer, items, Path(path).name)
    # argmax takes the first of equal values, as in the pipeline
    judged = [(item, int(each.argmax()) == 0) for item, each in zip(items, found, strict=True) if each is not None]
    if not judged:
        raise UserError(f"no item of {path} fits the student's context of {student.config.context} tokens")
    phenomena = _count((item.uid, correct) for item, correct in judged)
    kinds = dict.fromkeys(kind for item in items for kind in item.groups)
    groups = {kind: _count((i.groups[kind], c) for i, c in judged if kind in i.groups) for kind in kinds}

    splits: dict[str, set[str]] = {}
    for item, _ in judged:
        splits.setdefault(item.split, set()).add(item.uid)
    counts = [
        (phenomena[uid]["correct"], phenomena[uid]["total"], 1 / (len(splits) * len(uids)))
        for uids in splits.values() for uid in uids
    ]  # fmt: skip
    return {
        "accuracy": 100 * sum(weight * correct / total for correct, total, weight in counts),
        "ci": _percent(weighted(counts)),
        "items": len(judged),
        "too_long": len(items) - len(judged),
        "phenomena": phenomena,
        "groups": groups,
    }


def _count(judged: Iterable[tuple[str, bool]]) -> dict[str, dict[str, Any]]:
    counts: dict[str, list[int]] = {}
    for name, correct in judged:
        count = counts.setdefault(name, [0, 0])
        count[0] += correct
        count[1] += 1
    return {
        name: {"accuracy": 100 * c / n, "ci": _percent(wilson(c, n)), "correct": c, "total": n}
        for name, (c, n) in counts.items()
    }


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def evaluate_wug(student: Student, tokenizer: Tokenizer, path: str | Path) -> dict[str, Any]:
    """The wug test: Spearman's rank correlation between the student's preference for the first form (the softmax of the
    two log-probabilities) and the fraction of people who chose it.

    Returns correlation (-1..1), ci (bootstrap), items and too_long. Raises UserError for files of another task."""
    items = read_items(path)
    if any(item.ratio is None for item in items):
        raise UserError(f"{path} has items without a ratio: --wug takes the wug test's files")
    found = scores(student, tokenizer, items, Path(path).name)
    kept = [(each, item.ratio) for each, item in zip(found, items, strict=True) if each is not None]
    if len(kept) < 3:
        raise UserError(f"{path} has {len(kept)} items that fit the student's context: a correlation needs three")
    # In float32, as in the pipeline, where preferences near 0 and 1 become ties.
    model = torch.stack([each.float().softmax(0)[0] for each, _ in kept]).numpy()
    human = np.array([ratio for _, ratio in kept])

    def statistic(rows: np.ndarray) -> float:
        return spearman(model[rows], human[rows])

    return {
        "correlation": spearman(model, human),
        "ci": bootstrap(statistic, len(kept)),
        "items": len(kept),
        "too_long": len(items) - len(kept),
    }
