"""The files of a BabyLM submission, as its pipeline of 2026 writes them (babylm-org/babylm-eval,
strict/) and its collate_preds.py expects them:
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

# BabyLM's name of each of our tasks. Its data folder begins with our name; wug's, with its own.
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
    """The path of each task's data in BabyLM's full_eval or fast_eval. Raises UserError if there is
    none."""
    tasks = {}
    for task in TASKS:
        begin = "wug_adj" if task == "wug" else task
        folders = sorted(path for path in folder.glob(f"{begin}*") if path.is_dir())
        if folders:
            data = folders[0] / "reading_data.csv" if task == "reading" else folders[0]
            tasks[task] = str(data)
    if not tasks:
        raise UserError(
            f"{folder} is not BabyLM's full_eval or fast_eval: it holds none of {', '.join(TASKS)}"
        )
    return tasks


def save_predictions(
    model: Path, folder: Path, task: str, path: str, record: dict[str, Any]
) -> None:
    """Write the predictions of checkpoint `folder` on a task: under its name for the fast sets, as
    main for the full ones. model: RESULTS/MODEL; path: the task's data; record: its evaluation.
    Raises UserError if items are missing."""
    if record.get("too_long"):
        raise UserError(
            f"{folder}: {record['too_long']} items of {path} are longer than its context, and BabyLM asks for all: "
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
    """Surprisal, in nats, of each word of cdi_childes.json in each of its contexts, for ages of
    acquisition (Chang & Bergen 2022), as {"target_word", "context_id", "context", "surprisal"} in
    the file's order. As in the pipeline, words of one letter are left out, and texts that are too
    long get nan. Raises UserError for another file."""
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
