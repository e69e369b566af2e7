"""A trained student for use from Python: generates stories, and scores them with the built-in
teacher's rubric."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tinystory.data.corpus import open_corpus, recorded_corpus, story_corpora
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops.compute import pick_device
from tinystory.rubric.rubric import Rubric
from tinystory.student import checkpoint
from tinystory.student.generate import Story, encode_opening, generate
from tinystory.student.model import Student


@dataclass
class Storyteller:
    """A student from the checkpoint in `folder`. history: the record of its training. corpus: names
    or files to which the rubric is fitted; if empty, the student's corpus."""

    folder: Path
    student: Student
    tokenizer: Tokenizer
    history: dict[str, Any]
    corpus: Sequence[str] = ()

    def generate(
        self,
        openings: str | Sequence[str],
        n: int = 1,
        *,
        max_new_tokens: int = 0,
        seed: int = 0,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[Story]:
        """n stories for each opening, in order. max_new_tokens: 0 means up to the student's context.
        first_index: stories with other indices have other random numbers. Raises UserError for an
        opening that does not fit the context."""
        if isinstance(openings, str):
            openings = [openings]
        prompts = [opening for opening in openings for _ in range(n)]
        longest = max(len(encode_opening(self.tokenizer, prompt)) for prompt in prompts)
        room = max(self.student.config.context - longest, 1)
        return generate(
            self.student,
            None,
            self.tokenizer,
            prompts,
            first_index=first_index,
            max_new_tokens=max_new_tokens or room,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    @cached_property
    def rubric(self) -> Rubric:
        """The built-in teacher, which takes half a minute to fit. Raises UserError if the student's
        corpus is not recorded, or was a file: then `load` needs the corpus."""
        corpus = self.corpus or recorded_corpus(self.history.get("corpus"), self.folder)
        return Rubric(open_corpus(story_corpora(corpus)).mixed())

    def score(self, stories: Sequence[Story]) -> list[dict[str, int]]:
        """The rubric's scores of each story, from 0 to 3 for each criterion."""
        return [self.rubric.score(story.opening, story.text) for story in stories]


def load(
    run: str | os.PathLike[str], *, device: str = "auto", corpus: Sequence[str] = ()
) -> Storyteller:
    """The student of a run (its checkpoint `best`, or else the newest), of a checkpoint, or of a
    folder saved by transformers. corpus: see Storyteller. Raises UserError if there is none."""
    folder = checkpoint.find(Path(run))
    return Storyteller(folder, *checkpoint.load(folder, pick_device(device)), corpus)
