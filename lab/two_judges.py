"""Two judges in one reward: the mean of the rubric's score and of a story's sense, a coherence
score by a reader (lab/reader.py). Sense alone would reward bland sentences.

CORPUS=tinystories.txt python train_interact.py --preset english --reward lab/two_judges.py ...

docs/english.md has the other options. The environment variable CORPUS names the corpora and files
to which the rubric is fitted, separated by spaces (default: builtin). The variable READER has the
values of --reader of lab/judge.py."""

import os
from collections.abc import Sequence

import numpy as np

from lab.reader import PACKAGED, Reader
from tinystory.data.corpus import open_corpus
from tinystory.rubric.rubric import Rubric

NO_SENSE = -1.0  # nats per token that give a score of 0; 0 nats or more give the maximum score

rubric = Rubric(open_corpus(os.environ.get("CORPUS", "builtin").split()).mixed())
reader = Reader(os.environ.get("READER", PACKAGED))


def score(openings: Sequence[str], stories: Sequence[str]) -> list[float]:
    pairs = list(zip(openings, stories, strict=True))
    grades = np.array([sum(rubric.score(*pair).values()) / 9 for pair in pairs])
    senses = np.nan_to_num(reader.sense(pairs), nan=NO_SENSE)  # nan: a story without words
    return ((grades + np.clip(1 - senses / NO_SENSE, 0, 1)) / 2).tolist()
