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
LIMITS = """This is a small model that writes stories. It follows no instructions and knows no facts. Nothing filters
the stories, and they may repeat what the corpus says about people. A score that the model was trained on shows how well
it learned, not how good the stories are. Scores by different graders cannot be compared."""


def model_card(name: str, source: Path, student: Student, history: Record) -> str:
    """The text of the card, with the Hub's metadata. name: the exported folder; source: the
    checkpoint; history: the record loaded with the checkpoint, {} for a folder saved by
    transformers."""
    sizes = ", ".join(f"{key} {value}" for key, value in vars(student.config).items())
    size = sum(parameter.numel() for parameter in student.parameters())
    corpora = [Path(key).name for key in history.get("corpus", [])]  # no private paths
    paragraphs = [
        f"# {name}",
        f"A language model of {number(size)} parameters that writes stories, trained from scratch with tinystory. "
        f"It has GPT-2's layout: {sizes}.",
        USE.format(at=json.dumps(name)),
        f"## Training data\n\n{number(history.get('words'))} words of {_code(', '.join(corpora))}, counting repeats.",
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
    """Paragraphs about the run of a checkpoint: validation, interaction, scores, a pair of stories,
    findings."""
    run = source.resolve().parents[1]
    step = checkpoint.read_counters(source)["step"]
    config = read_config(run)
    metrics = [record for record in read_metrics(run) if record["step"] <= step]
    bits = [record["val_bits_per_byte"] for record in metrics if record.get("val_bits_per_byte")]
    if bits:
        yield f"Held-out documents have {bits[-1]:.3f} bits per byte."
    if not is_interaction(metrics):
        return
    yield (
        f"## Interaction, and the grader\n\nIn {step} steps of PPO the model wrote "
        f"{number(history.get('interaction_words_out'))} words and took in "
        f"{number(history.get('interaction_words_in'))} words of openings and replies. The KL from the "
        f"model before interaction is {number(metrics[-1].get('kl'))} nats per story. "
        f"{_code(scorer(config))} graded the stories. On texts of known quality, this grader "
        f"{_plain(verdict(config))}."
    )
    comparison = read_before_after(run, step)
    if comparison is None:
        return
    yield "## Scores"
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
    """A Markdown table. rows: the header, then the other rows."""
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
    """Recorded text as inline code on one line, without backticks, which would end the code, and
    without characters that a lenient renderer takes for HTML."""
    plain = re.sub("[`<>]", "", printable(text))
    return f"`{' '.join(plain.split()) or 'not recorded'}`"
