"""Writes the files of a BabyLM submission, in the format of the pipeline of 2026
(babylm-org/babylm-eval, strict/), for its collate_preds.py:
RESULTS/MODEL/REVISION/zero_shot/causal/TASK/DATASET/predictions.json."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.pairs import babylm_file
from lab.scoring import part, sum_logprobs
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.files import atomic_write
from tinystory.student.model import Student

# BabyLM's name of each of our tasks. A task's data folder begins with our name, and a wug test's
# with BabyLM's name.
TASKS = {
    "blimp": "blimp",
    "ewok": "ewok",
    "entity_tracking": "entity_tracking",
    "wug_past": "wug_past",
    "comps": "comps",
    "reading": "reading",
    "supplement": "blimp",
    "wug": "wug_adj",
}


def find_tasks(folder: Path) -> dict[str, str]:
    """The path of each task's data in BabyLM's full_eval or fast_eval. Raises UserError if the
    folder has no task."""
    tasks = {}
    for task in TASKS:
        begin = "wug_adj" if task == "wug" else task
        folders = sorted(path for path in folder.glob(f"{begin}*") if path.is_dir())
        if folders:
            data = folders[0]
            if task == "reading":
                is_gzipped = (data / "reading_data.csv.gz").exists()
                data /= "reading_data.csv.gz" if is_gzipped else "reading_data.csv"
            tasks[task] = str(data)
    if not tasks:
        raise UserError(
            f"{folder} is not BabyLM's full_eval or fast_eval: it holds none of {', '.join(TASKS)}"
        )
    return tasks


def save_predictions(
    model: Path, folder: Path, task: str, path: str, record: dict[str, Any]
) -> None:
    """Write the predictions of checkpoint `folder` on a task: under the checkpoint's name for the
    fast sets, and under "main" for the full sets. model: RESULTS/MODEL; path: the task's data;
    record: the evaluation of the task. Raises UserError if items are missing."""
    if record.get("too_long"):
        raise UserError(
            f"{folder}: {record['too_long']} items of {path} exceed the student's context, and BabyLM requires all: "
            "evaluate a student that was trained with a longer --context"
        )
    place = Path(TASKS[task])
    evaluation_data = Path(path).parent
    if task == "reading":
        evaluation_data = evaluation_data.parent
    else:
        place /= Path(path).name
    is_fast = (evaluation_data / "blimp_fast").is_dir()
    causal = model / (folder.name if is_fast else "main") / "zero_shot" / "causal"
    write_json(causal / place / "predictions.json", record["predictions"])


def save_surprisals(model: Path, results: Sequence[dict[str, Any]]) -> None:
    steps = len({row["step"] for row in results})
    metadata = {
        "model_name": model.name,
        "use_bos_only": False,
        "total_steps": steps,
        "completed_steps": steps,
    }
    path = model / "main/zero_shot/causal/AoA_word/surprisal.json"
    write_json(path, {"metadata": metadata, "results": results})


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(value))


def word_surprisals(
    student: Student, tokenizer: Tokenizer, path: str | Path
) -> list[dict[str, Any]]:
    """Surprisals, in nats, of each word of cdi_childes.json in each of its contexts, as
    {"target_word", "context_id", "context", "surprisal"} in the file's order, for the age of
    acquisition (Chang & Bergen 2022). As in the pipeline, words of one letter are left out, and
    texts that exceed the context get nan. Raises UserError for another file."""
    rows: list[dict[str, Any]] = []
    parts = []
    with babylm_file(Path(path), "BabyLM's cdi_childes.json") as file:
        for word, contexts in json.load(file).items():
            if len(word) < 2:
                continue
            for i, entry in enumerate(contexts):
                context = entry["context"]
                parts.append(part(tokenizer, f"{context.strip()} ", word.strip()))
                rows.append({"target_word": word, "context_id": i, "context": context})
    fitting = []
    groups = []
    for row, text in zip(rows, parts, strict=True):
        row["surprisal"] = math.nan
        if len(text.ids) <= student.config.context:
            fitting.append(row)
            groups.append([text])
    sums = sum_logprobs(student, groups, "age of acquisition")
    for row, logprob in zip(fitting, sums, strict=True):
        row["surprisal"] = -float(logprob)
    return rows
