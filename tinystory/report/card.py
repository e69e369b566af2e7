"""The model card (README.md) of an exported student, from its training history."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinystory.data.corpus import BUILTIN, HUB, LICENCES
from tinystory.report.charts import number
from tinystory.run.text import printable
from tinystory.student.model import Student

USE = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained({at}), AutoModelForCausalLM.from_pretrained({at})
ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("Once upon a time,").input_ids]])  # as each document began
print(tokenizer.decode(model.generate(ids, do_sample=True, max_length=model.config.n_positions)[0]))
```"""
LIMITS = """This is a small model that writes stories. It follows no instructions and knows no facts. Nothing filters
the stories, and they may repeat what the corpus says about people."""


def model_card(name: str, student: Student, history: Mapping[str, Any]) -> str:
    """The text of the card, with the Hub's metadata. name: the exported folder; history: the record
    loaded with the checkpoint, {} for a folder saved by transformers."""
    sizes = ", ".join(f"{key} {value}" for key, value in vars(student.config).items())
    size = sum(parameter.numel() for parameter in student.parameters())
    corpora = [Path(key).name for key in history.get("corpus", [])]  # no private paths
    read = ", ".join(corpora) or "not recorded"
    paragraphs = [
        f"# {name}",
        f"A language model of {number(size)} parameters that writes stories, trained from scratch with tinystory. "
        f"It has GPT-2's layout: {sizes}.",
        USE.format(at=json.dumps(name)),
        f"## Training data\n\n{number(history.get('words'))} words of {_code(read)}, counting repeats.",
    ]
    written = history.get("interaction_words_out")
    if written:
        paragraphs.append(
            f"Then the model learned by interaction. It wrote {number(written)} words of stories, which were "
            f"scored, and took in {number(history.get('interaction_words_in'))} words of openings and replies."
        )
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


def _code(text: str) -> str:
    """Recorded text as inline code on one line, without backticks, which would end the code, and
    without characters that a lenient renderer takes for HTML."""
    plain = re.sub("[`<>]", "", printable(text))
    return f"`{' '.join(plain.split())}`"
