"""JSON files with one object, such as config.json, or with one object per line, such as
metrics.jsonl.

A run's folder may have been cut, edited or written by another program. So each kind of file has one
reader here, which checks names, types and sizes for all callers."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tinystory.run.errors import UserError
from tinystory.run.files import LONGEST, atomic_file, file_hash, open_bytes, read_text, sync

Record: TypeAlias = dict[str, Any]  # one JSON object
# allowed types by field; None among them: the field may be missing
Fields: TypeAlias = dict[str, tuple[type | None, ...]]

CONFIG = "config.json"
METRICS = "metrics.jsonl"  # one object per step
STORIES = "stories.jsonl"  # one object per story
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"  # stories for held-out openings
FINDINGS = "findings.jsonl"  # findings of other programs about the run, for the report
PAIRS = "pairs.jsonl"  # a human's comparisons of stories before and after interaction
MANIFEST = "manifest.json"
LARGEST = 1e100  # bound on the absolute value of a number in a record

NUMBER = (int, float, type(None))
NO_FIELDS: Fields = {}
STORY_FIELDS: Fields = {
    "opening": (str,),
    "story": (str,),
    "scores": (dict, type(None)),
    "step": (int,),
    "index": (int,),
    "reply": (str, type(None)),
    "reward": NUMBER,
    "words": (int,),
    "ended": (str,),
    "score": NUMBER,
    "difference": (*NUMBER, None),
    "predicted": (*NUMBER, None),
    "judge": (*NUMBER, None),
}
FIELDS: dict[str, Fields] = {  # required fields of each record, by file
    METRICS: {"step": (int,)},
    STORIES: STORY_FIELDS,
    EVALUATIONS: STORY_FIELDS,
    SAMPLES: STORY_FIELDS | {"when": (str,)},
    CONFIG: {"options": (dict,), "started": (str,), "device": (str,), "resumed": (list,)},
    PAIRS: {
        "key": (str,),
        "index": (int,),
        "opening": (str,),
        "preferred": (str,),
        "by": (str,),
        "at": (str,),
    },
    FINDINGS: {"title": (str,), "step": (int,), "sentences": (list,), "table": (list,)},
}


# ---- one object ----------------------------------------------------------------------------------


def read_object(path: Path, fields: Fields = NO_FIELDS) -> Record:
    """The JSON object in a file. Raises UserError unless the file is a JSON object with these
    fields."""
    text = read_text(path)
    try:
        return parse_object(text, fields)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def parse_object(text: bytes | str, fields: Fields) -> Record:
    """The JSON object in a text. Raises ValueError unless the text is a JSON object with these
    fields and without NaN or Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    try:
        record = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    check_fields(record, fields)
    return record


def check_fields(record: Record, fields: Fields) -> None:
    """Raises ValueError for a field that is missing, has the wrong type, or is out of range."""
    for name, types in fields.items():
        if name not in record:
            if None in types:
                continue
            raise ValueError(f"it has no {name!r}")
        value = record[name]
        if type(value) not in types:
            raise ValueError(f"its {name!r} is {value!r:.40}")
        if int in types and float not in types and not 0 <= value < 1 << 53:
            raise ValueError(f"its {name!r} is negative or too large")
        if float in types:
            check_size(name, value)
    if fields is FIELDS[METRICS]:
        # every other value is a number, true, false or null, except what a teacher reports about
        # itself
        for name, value in record.items():
            if type(value) not in (*NUMBER, bool) and not name.startswith("teacher_"):
                raise ValueError(f"its {name!r} is {value!r:.40}")
            check_size(name, value)
    if "story" in fields:
        for level in (record["scores"] or {}).values():
            if type(level) not in (int, float) or not 0 <= level <= 3:
                raise ValueError("a score in it is not a number from 0 to 3")
        score = record.get("score")  # a human's grades have none
        if score is not None and not 0 <= score <= 1:
            raise ValueError("its 'score' is not a number from 0 to 1")


def check_size(name: str, value: Any) -> None:
    if isinstance(value, int | float) and not -LARGEST < value < LARGEST:
        raise ValueError(f"its {name!r} is too large")


# ---- one object per line -------------------------------------------------------------------------


def read_records(
    path: Path, fields: Fields | None = None, check: Callable[[Record], None] | None = None
) -> Iterator[Record]:
    """Yields the records of a JSON Lines file; none if the file is missing. fields: required fields
    (default: FIELDS of the file's name). check: function that raises ValueError for a record to be
    refused for other reasons. A last line that a killed process left incomplete is skipped. Raises
    UserError for any other line that is not such a record."""
    if not path.exists():
        return
    if fields is None:
        fields = FIELDS.get(path.name, NO_FIELDS)
    number = 0
    with open_bytes(path) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if line == b"\n":
                continue
            try:
                if len(line) > LONGEST:
                    raise ValueError(f"it is over {LONGEST >> 20} MB")
                record = parse_object(line, fields)
                if check is not None:
                    check(record)
            except ValueError as error:
                is_incomplete = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
                if is_incomplete and not line.endswith(b"\n"):
                    return
                raise UserError(
                    f"line {number} of {path} is not a record of this file ({error}): fix or delete that "
                    "line, or choose another file"
                ) from None
            yield record


def read_metrics(folder: Path) -> list[Record]:
    return list(read_records(folder / METRICS))


def column(metrics: Iterable[Record], key: str) -> list[float | None]:
    """The values of a key; None for each value that is not a number, such as a server may have
    sent."""
    values = [record.get(key) for record in metrics]
    return [value if type(value) in (int, float) else None for value in values]


def total(metrics: Iterable[Record], key: str) -> float:
    """The sum of the numbers among the values of a key."""
    return sum(filter(None, column(metrics, key)))


def read_stories(folder: Path) -> Iterator[Record]:
    """Yields the records of stories.jsonl one at a time, because a long run's file is too large for
    memory."""
    return read_records(folder / STORIES)


def keep_until(path: Path, step: int) -> None:
    """Remove the records of steps after `step` from a file."""
    if not path.exists():
        return
    with atomic_file(path) as file:
        for record in read_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record).encode() + b"\n")


def add_to_record(path: Path, step: int, values: Record, costs: Record) -> None:
    """Add values to the record of a step, and add costs to the costs in the record. `teacher_cost`
    is the cost of the whole run and replaces the earlier value."""
    with atomic_file(path) as file:
        for record in read_records(path):
            if record["step"] == step:
                record |= values
                for name, cost in costs.items():
                    before = 0 if name == "teacher_cost" else record.get(name) or 0
                    record[name] = before + cost
            file.write(json.dumps(record).encode() + b"\n")


def plain(value: Any) -> Any:
    """The value as JSON types: tensor and NumPy scalars become numbers, floats keep 7 digits, and
    floats that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


# ---- manifests -----------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of each file in a folder to the folder's MANIFEST, and sync
    all files."""
    manifest = {path.name: size_and_hash(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in folder.iterdir():
        sync(path)


def require_whole(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError, naming the file, unless these files match the folder's MANIFEST."""
    manifest = read_object(folder / MANIFEST)
    for name in names:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing")
        if not path.is_file() or manifest.get(name) != size_and_hash(path):
            raise UserError(
                f"{path} does not match {MANIFEST} beside it: one of the two files is damaged"
            )


def size_and_hash(path: Path) -> Record:
    return {"size": path.stat().st_size, "sha256": file_hash(path)}
