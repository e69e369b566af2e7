"""The files of a BabyLM submission, as its pipeline of 2026 writes them (babylm-org/babylm-eval,
strict/) and its collate_preds.py expects them:
RESULTS/MODEL/REVISION/zero_shot/causal/TASK/DATASET/predictions.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.pairs import babylm_file
from lab.scoring import part, sum_logprobs
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.files import atomic_write
from tinystory.student.model import Student

# Our tasks -> BabyLM's, whose data folders begin with our name (for wug, with its own).
TASKS = {
    name: name for name in ("blimp", "ewok", "entity_tracking", "wug_past", "comps", "reading")
}
TASKS |= {"supplement": "blimp", "wug": "wug_adj"}


def find_tasks(folder: Path) -> dict[str, str]:
    """The path of each task's data in BabyLM's full_eval or fast_eval. Raises UserError if there is
    none."""
    names = sorted(path.name for path in folder.glob("*/") if path.is_dir())
    begins = {task: task for task in TASKS} | {"wug": "wug_adj"}
    tasks = {
        task: folder / name
        for task in TASKS
        for name in names[::-1]
        if name.startswith(begins[task])
    }
    if not tasks:
        raise UserError(
            f"{folder} is not BabyLM's full_eval or fast_eval: it holds none of {', '.join(TASKS)}"
        )
    return {
        task: str(path / "reading_data.csv" if task == "reading" else path)
        for task, path in tasks.items()
    }


def save_predictions(
    model: Path, folder: Path, task: str, path: str, record: dict[str, Any]
) -> None:
    """Write the predictions of checkpoint `folder` on a task: under its name for the fast sets, as
    main for the full ones. model: RESULTS/MODEL; path: the task's data; record: its evaluation.
    Raises UserError if items are missing."""
    data = Path(path).parents[task == "reading"]
    if record.get("too_long"):
        raise UserError(
            f"{folder}: {record['too_long']} items of {path} are longer than its context, and BabyLM asks for all: "
            "evaluate a student that was trained with a longer --context"
        )
    revision = folder.name if (data / "blimp_fast").is_dir() else "main"
    place = Path(TASKS[task], "" if task == "reading" else Path(path).name)
    _write(
        model / revision / "zero_shot/causal" / place / "predictions.json", record["predictions"]
    )


def save_surprisals(model: Path, results: Sequence[dict[str, Any]]) -> None:
    steps = len({row["step"] for row in results})
    facts = dict(
        model_name=model.name, use_bos_only=False, total_steps=steps, completed_steps=steps
    )
    _write(
        model / "main/zero_shot/causal/AoA_word/surprisal.json",
        {"metadata": facts, "results": results},
    )


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(value))


def word_surprisals(
    student: Student, tokenizer: Tokenizer, path: str | Path
) -> list[dict[str, Any]]:
    """Surprisal, in nats, of each word of cdi_childes.json in each of its contexts, for ages of
    acquisition (Chang & Bergen 2022), as {"target_word", "context_id", "context", "surprisal"} in
    the file's order. As in the pipeline, words of one letter are left out, and texts that are too
    long get nan. Raises UserError for another file."""
    with babylm_file(Path(path), "BabyLM's cdi_childes.json") as file:
        words = json.load(file)
        items = [
            (w, i, c["context"])
            for w, contexts in words.items()
            if len(w) > 1
            for i, c in enumerate(contexts)
        ]
        parts = [part(tokenizer, f"{context.strip()} ", word.strip()) for word, _, context in items]
    fits = [len(ids) <= student.config.context for ids, _ in parts]
    groups = [[part] for part, fit in zip(parts, fits, strict=True) if fit]
    sums = iter(sum_logprobs(student, groups, "age of acquisition"))
    return [
        dict(
            target_word=word,
            context_id=i,
            context=context,
            surprisal=-float(next(sums)) if fit else float("nan"),
        )
        for (word, i, context), fit in zip(items, fits, strict=True)
    ]
