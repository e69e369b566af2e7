"""Stories by anybody: a student, another model, humans."""

from pathlib import Path
from typing import NamedTuple

from tinystory.run.errors import UserError
from tinystory.run.folder import read_records


class Sample(NamedTuple):
    """A story; `text` goes on from the opening."""

    opening: str
    text: str
    ended: str | None = None  # "eos" or "length", if known
    entropy: float | None = None  # of the distributions that it was sampled from, summed over tokens, in nats


def read_samples(path: Path) -> list[Sample]:
    """The stories of a .jsonl file, by whatever model or human: objects with `opening` and `story`, which goes on from
    it, and `ended` where known. An opening that `story` repeats is left out. Raises UserError for any other file."""
    stories = []
    for number, record in enumerate([*read_records(path)] or [{}], 1):  # an empty file lacks its first line
        opening, story, ended = (record.get(name) for name in ("opening", "story", "ended"))
        if not (isinstance(opening, str) and isinstance(story, str)):
            raise UserError(f"{path} line {number} lacks an opening and a story: each line is an object with both")
        stories.append(Sample(opening, story.removeprefix(opening).strip(), ended if isinstance(ended, str) else None))
    return stories
