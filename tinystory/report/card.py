"""The model card of an exported student: README.md beside its weights, from the records of its run and nothing else."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tinystory.data.corpus import BUILTIN, HUB, LICENCES
from tinystory.evaluate.held_out import reward_mean, story_means
from tinystory.evaluate.preference import run_preferences
from tinystory.evaluate.stories import mean_of
from tinystory.report.charts import number
from tinystory.report.judges import preference_lines
from tinystory.report.run import scorer
from tinystory.run.folder import EVALUATIONS, Record, read_config, read_metrics, read_records
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.student.model import Student

USE = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained({at}), AutoModelForCausalLM.from_pretrained({at})
ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("Once upon a time,").input_ids]])  # as each document began
print(tokenizer.decode(model.generate(ids, do_sample=True, max_length=model.config.n_positions)[0]))
```"""
LIMITS = """It is a small model of stories: it follows no instructions, knows no facts, and nothing filters its stories.
What its corpus says of people, it may say too. A score that it was trained on says how well it learned, not how good
its stories are, and scores by different graders cannot be compared."""
MEASURES = {
    "score": "score, the sum of the criteria",
    "reward": "reward, 0 to 1",
    "ended": "fraction of stories that end",
    "length_mean": "words per story",
    "distinct_4": "distinct 4-grams",
    "story_clusters": "clusters of similar stories",
}


def model_card(name: str, source: Path, student: Student, facts: Record, revision: str = "") -> str:
    """The text of the card, with the Hub's metadata. name: the repository, with the revision, or the folder to load the
    student from; source: its checkpoint; facts: what was loaded with it ({} for a folder that transformers wrote, whose
    history is not known)."""
    shape = student.config
    corpora = [Path(key).name for key in facts.get("corpus", [])]  # no folders of whoever trained it
    size = sum(parameter.numel() for parameter in student.parameters())
    paragraphs = [
        f"# {name}",
        f"A storyteller of {number(size)} parameters, trained from scratch with tinystory: GPT-2's architecture, "
        f"{shape.n_layer} layers, width {shape.n_embd}, {shape.n_head} heads, {shape.context} tokens of context, a "
        f"vocabulary of {shape.vocab_size}.",
        USE.format(at=json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")),
        "## What it read",
        f"{number(facts['words'])} words, counting repeats, of {_codes(corpora)}."
        if "words" in facts
        else "What it was trained on is not recorded.",
        *(_run(source, facts) if facts else ()),
        "## Limits",
        LIMITS,
        "## Licence of the corpus",
        "\n".join(f"- {_codes([key])}: {LICENCES.get(key, 'files of the user who trained it')}" for key in corpora)
        or "Not recorded.",
    ]
    known = bool(corpora) and set(corpora) <= set(LICENCES)
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [tinystory]"]
    if datasets := [HUB[key][0] for key in corpora if key in HUB]:
        metadata.append(f"datasets: {json.dumps(datasets)}")
    metadata += ["language: en"] * known + ["license: mit"] * (known and set(corpora) <= set(BUILTIN))
    return "\n".join(["---", *metadata, "---", "", *(f"{text}\n" for text in paragraphs)])


def _run(source: Path, facts: Record) -> Iterable[str]:
    """The paragraphs about the run that a checkpoint of ours lies in."""
    run, step = source.resolve().parents[1], checkpoint.read_counters(source)["step"]
    options, metrics = read_config(run).get("options", {}), [row for row in read_metrics(run) if row["step"] <= step]
    validated = [row for row in metrics if row.get("val_bits_per_byte") is not None]
    if validated:
        yield f"Held-out documents take {validated[-1]['val_bits_per_byte']:.3f} bits per byte."
    if not metrics or "reward_mean" not in metrics[-1]:
        return
    yield "## How it interacted, and who graded"
    calibration = options.get("calibration")
    verdict = calibration["verdict"] if calibration else "was not calibrated before the run"
    yield (
        f"In {step} steps of PPO (preset {options['preset']}) it wrote {number(facts['interaction_words_out'])} words, "
        f"took in {number(facts['interaction_words_in'])} of openings and replies, and moved "
        f"{number(metrics[-1]['kl'])} nats per story from the student before. {_codes([scorer(read_config(run))])} "
        f"graded; as a judge of known stories, it {verdict}."
    )
    evaluations: dict[int, list[Record]] = {}
    for record in read_records(run / EVALUATIONS):
        evaluations.setdefault(record["step"], []).append(record)
    last = max((at for at in evaluations if at <= step), default=0)
    if last and 0 in evaluations:
        before, after = (_means(evaluations[at]) for at in (0, last))
        yield "## What it scores"
        yield f"Means over {len(evaluations[last])} stories, to held-out openings unless there was only one:"
        cells = {text: (before[key], after[key]) for key, text in MEASURES.items() if after[key] is not None}
        rows = [f"| {text} | {number(a)} | {number(b)} |" for text, (a, b) in cells.items()]
        yield "\n".join([f"| | before interaction | after step {last} |", "|---|---|---|", *rows])
        for line in preference_lines(run_preferences(run)):
            yield escape(printable(line)).replace("[", "\\[") + "."
        example = f"{evaluations[last][0]['opening']} {evaluations[last][0]['story']}"
        yield "The first of these stories, not the best:"
        yield textwrap.indent(textwrap.fill(printable(example), 100), "    ")


def _means(records: Sequence[Record]) -> Record:
    scores = (sum(record["scores"].values()) for record in records if record["scores"])
    return {"score": mean_of(scores), "reward": reward_mean(records)} | story_means(records)


def _codes(names: Iterable[str]) -> str:
    """Names as Markdown that no name can break out of."""
    return ", ".join(f"`{printable(name).replace('`', '')}`" for name in names)
