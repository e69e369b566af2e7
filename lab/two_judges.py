"""Two judges in one reward: the mean of the rubric's score and of the sense that a story makes to a
reader (lab/reader.py), which alone would pay for bland sentences.

CORPUS=tinystories.txt python train_interact.py --preset english --reward lab/two_judges.py ...

The other options: docs/english.md. CORPUS: corpora and files that the rubric is fitted to,
separated by spaces (default: builtin). READER: as --reader of lab/judge.py."""

import os
from collections.abc import Sequence

import numpy as np

from lab.reader import PACKAGED, Reader
from tinystory.data.corpus import open_corpus
from tinystory.rubric.rubric import Rubric

NO_SENSE = -1.0  # nats per token, for a score of 0; full marks from 0 nats on

rubric = Rubric(open_corpus(os.environ.get("CORPUS", "builtin").split()).mixed())
reader = Reader(os.environ.get("READER", PACKAGED))


def score(openings: Sequence[str], stories: Sequence[str]) -> list[float]:
    pairs = list(zip(openings, stories, strict=True))
    grades = np.array([sum(rubric.score(*pair).values()) / 9 for pair in pairs])
    senses = np.nan_to_num(reader.sense(pairs), nan=NO_SENSE)  # nan: no words
    return ((grades + np.clip(1 - senses / NO_SENSE, 0, 1)) / 2).tolist()
