"""The model card (README.md) of an exported student, from the records of its run alone."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinystory.data.corpus import BUILTIN, HUB, LICENCES
from tinystory.report.before_after import grade_line, read_before_after
from tinystory.report.charts import number
from tinystory.report.findings import read_findings
from tinystory.report.run import is_interaction, scorer, verdict
from tinystory.run.folder import read_config
from tinystory.run.records import Record, read_metrics
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


def model_card(name: str, source: Path, student: Student, history: Record) -> str:
    """The text of the card, with the Hub's metadata. name: the folder to load from; source: the
    checkpoint; history: loaded with it, {} for a folder that transformers wrote."""
    sizes = ", ".join(f"{key} {value}" for key, value in vars(student.config).items())
    size = sum(parameter.numel() for parameter in student.parameters())
    corpora = [Path(key).name for key in history.get("corpus", [])]  # no private paths
    paragraphs = [
        f"# {name}",
        f"A storyteller of {number(size)} parameters, trained from scratch with tinystory. GPT-2's layout, {sizes}.",
        USE.format(at=json.dumps(name)),
        f"## What it read\n\n{number(history.get('words'))} words, counting repeats, of {_code(', '.join(corpora))}.",
    ]
    if history:
        paragraphs += _run(source, history)
    paragraphs.append(f"## Limits\n\n{LIMITS}")
    paragraphs.append("## Licence of the corpus")
    licences = ""
    for key in corpora:
        licences += f"- {_code(key)}: {LICENCES.get(key, 'files of the user who trained it')}\n"
    paragraphs.append(licences or "Not recorded.")
    body = "\n\n".join(paragraphs)
    return f"---\n{_metadata(corpora)}\n---\n\n{body}\n"


def _metadata(corpora: Sequence[str]) -> str:
    """The Hub's metadata, in YAML."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [tinystory]"]
    datasets = [HUB[key][0] for key in corpora if key in HUB]
    if datasets:
        lines.append(f"datasets: {json.dumps(datasets)}")
    if corpora and set(corpora) <= set(LICENCES):
        lines.append("language: en")
        if set(corpora) <= set(BUILTIN):
            lines.append("license: mit")
    return "\n".join(lines)


def _run(source: Path, history: Record) -> Iterable[str]:
    """Paragraphs about the run that one of our checkpoints belongs to."""
    run = source.resolve().parents[1]
    step = checkpoint.read_counters(source)["step"]
    config = read_config(run)
    metrics = [record for record in read_metrics(run) if record["step"] <= step]
    bits = [record["val_bits_per_byte"] for record in metrics if record.get("val_bits_per_byte")]
    if bits:
        yield f"Held-out documents take {bits[-1]:.3f} bits per byte."
    if not is_interaction(metrics):
        return
    yield (
        f"## How it interacted, and who graded\n\nIn {step} steps of PPO it wrote "
        f"{number(history.get('interaction_words_out'))} words, took in "
        f"{number(history.get('interaction_words_in'))} of openings and replies, and moved "
        f"{number(metrics[-1].get('kl'))} nats per story from the student before. "
        f"{_code(scorer(config))} graded. On stories of known order, it {_plain(verdict(config))}."
    )
    comparison = read_before_after(run, step)
    if comparison is None:
        return
    yield "## What it scores"
    yield _table(comparison.table())
    rule, pair = comparison.typical()
    yield rule
    for name, record in zip(comparison.names, pair, strict=False):  # there may be no pair
        yield f"{name.capitalize()}, {_plain(grade_line(record))}:"
        story = textwrap.fill(printable(f"{record['opening']} {record['story']}"), 96)
        yield textwrap.indent(story, "    ")
    for finding in read_findings(run):
        yield f"## {_plain(finding['title'])}, after step {finding['step']}"
        yield from map(_plain, finding["sentences"])
        if finding["table"]:
            yield _table(finding["table"])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. rows: the header, then the others."""
    lines = []
    for row in rows:
        cells = " | ".join(_plain(cell) for cell in row)
        lines.append(f"| {cells} |")
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _plain(text: object) -> str:
    """Recorded text on one line, without Markdown's special characters."""
    return re.sub(r"[<>\[\]`*_|]", "", " ".join(printable(str(text)).split()))


def _code(text: str) -> str:
    """Recorded text as inline code on one line, without backticks that would end it, and without
    signs that a lenient renderer takes for HTML."""
    plain = re.sub("[`<>]", "", printable(text))
    return f"`{' '.join(plain.split()) or 'not recorded'}`"
