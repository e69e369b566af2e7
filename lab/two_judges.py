"""Two judges in one reward: the mean of the rubric's score and of a second judge's. The second
judge is a reader (lab/reader.py), which scores coherence, or a language model behind an
endpoint. A judge of coherence alone would reward bland sentences.

CORPUS=tinystories.txt python train_interact.py --preset english --reward lab/two_judges.py ...

docs/corpus.md has the other options. With lab/two_judges.py:by_sentence, a reader's part of the score
is given at the end of each sentence. Environment variables:

CORPUS    the corpora and files to which the rubric is fitted, separated by spaces (default: builtin)
READER    the reader: a value of --reader of lab/judge.py
TEACHER   options of train_interact.py that name a teacher, which then replaces the reader:
          TEACHER="--teacher-url http://127.0.0.1:8000/v1 --teacher-prompt examples"; a resumed run
          asks again about the stories of the step that was interrupted
"""

import atexit
import contextlib
import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from lab.reader import PACKAGED, Reader, one_line
from lab.runs import interact_config, words_of
from tinystory.data.corpus import open_corpus
from tinystory.evaluate.calibration import calibrated, scaled
from tinystory.evaluate.corruptions import corpus_documents, split_sentences, worked_examples
from tinystory.evaluate.open_grader import open_grader
from tinystory.rubric.rubric import Rubric
from tinystory.teacher.grade import Grader

Stories: TypeAlias = Sequence[tuple[str, str]]  # (opening, story)

NO_COHERENCE = -1.0  # nats per token that give a score of 0; 0 nats or more give the maximum score

corpus = os.environ.get("CORPUS", "builtin").split()


def open_teacher(options: str) -> Grader:
    """The teacher of these options, calibrated, until this process ends."""
    config = interact_config(words_of("TEACHER", options))
    grader = open_grader(
        config, corpus=corpus, examples=lambda: worked_examples(corpus_documents(corpus))
    )
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    teacher = stack.enter_context(grader)
    scaled(teacher, corpus)
    calibrated(config, teacher, corpus)
    return teacher


def read(stories: Stories) -> np.ndarray:
    """The reader's scores, 0..1, float64 (n,)."""
    return scores_of(reader.coherence(stories))


def scores_of(coherences: np.ndarray) -> np.ndarray:
    """Scores, 0..1, float64 (n,), of coherences in nats per token. nan: a story without words."""
    coherences = np.nan_to_num(coherences, nan=NO_COHERENCE)
    return np.clip(1 - coherences / NO_COHERENCE, 0, 1)


def ask(stories: Stories) -> np.ndarray:
    """The teacher's scores, 0..1, float64 (n,); nan for a story without a score."""
    return np.array([grade.score for grade in teacher.grade_each(stories)], float)


rubric = Rubric(open_corpus(corpus).mixed())
if "TEACHER" in os.environ:
    teacher = open_teacher(os.environ["TEACHER"])
    second = ask
else:
    reader = Reader(os.environ.get("READER", PACKAGED))
    second = read


def grades(stories: Stories) -> np.ndarray:
    """The rubric's scores, 0..1, float64 (n,)."""
    return np.array([sum(rubric.score(*pair).values()) / 9 for pair in stories])


def score(openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
    pairs = list(zip(openings, stories, strict=True))
    means = (grades(pairs) + second(pairs)) / 2
    return [None if np.isnan(mean) else float(mean) for mean in means]


def by_sentence(openings: Sequence[str], stories: Sequence[str]) -> list[list[float]]:
    """The scores of `score`, in parts for each word and for the end of each story."""
    if "TEACHER" in os.environ:
        raise ValueError("by_sentence needs a reader, which TEACHER replaces: unset TEACHER")
    pairs = list(zip(openings, stories, strict=True))
    parts_of_each = reader.by_sentence(pairs)
    coherences = np.array([parts.sum() if len(parts) else np.nan for parts in parts_of_each])
    means = (grades(pairs) + scores_of(coherences)) / 2
    return [by_word(*each) for each in zip(stories, parts_of_each, means, strict=True)]


def by_word(story: str, coherences: np.ndarray, score: float) -> list[float]:
    """A story's score in parts: the last word of each sentence has half of the sentence's coherence, and
    the end of the story has the rest. coherences: of the first sentences, because the reader cuts a
    long story."""
    sentences = split_sentences(one_line(story))[: len(coherences)]
    sentence_ends = np.cumsum([len("".join(sentence.split())) for sentence in sentences])
    word_ends = np.cumsum([len(word) for word in story.split()])
    last_words = np.searchsorted(word_ends[:-1], sentence_ends)
    parts = np.zeros(len(word_ends))
    np.add.at(parts, last_words, coherences / -NO_COHERENCE / 2)
    return [*parts.tolist(), float(score - parts.sum())]
