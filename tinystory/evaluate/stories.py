"""Stories by a student, another model or humans, and their measures: scores, diversity, copying,
length and endings."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from tinystory.data.corpus import Corpus
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import mean_and_ci, mean_ci, wilson
from tinystory.rl.reward import phrases
from tinystory.run.errors import UserError
from tinystory.run.folder import read_records
from tinystory.student.generate import generate
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader, score_means

OPENINGS = (
    "Once upon a time, in a faraway land,",
    "One day, a little girl named Lily",
    "Tom had a dog who",
    "The old man looked at the sea and",
    "It was a dark night when",
    "Deep in the wood there lived",
    "Mia was sad because",
    "There was once a king who",
)


class Sample(NamedTuple):
    """A story; `text` goes on from the opening."""

    opening: str
    text: str
    ended: str | None = None  # "eos" or "length", if known


def read_samples(path: Path) -> list[Sample]:
    """The stories of a .jsonl file of objects with `opening`, `story`, which goes on from it (a
    repeated opening is removed), and, where known, `ended`. Raises UserError for any other file."""
    stories = []
    # an empty file lacks its first line
    for number, record in enumerate([*read_records(path)] or [{}], 1):
        opening, story, ended = (record.get(name) for name in ("opening", "story", "ended"))
        if not (isinstance(opening, str) and isinstance(story, str)):
            raise UserError(
                f"{path} line {number} lacks an opening and a story: each line is an object with both"
            )
        stories.append(
            Sample(
                opening,
                story.removeprefix(opening).strip(),
                ended if isinstance(ended, str) else None,
            )
        )
    return stories


def distinct_ngrams(texts: list[str], n: int = 4) -> float | None:
    """Distinct word n-grams divided by all word n-grams of the texts (Li et al. 2016, arXiv
    1510.03055): close to 0 if all texts are the same, None without n-grams."""
    grams = [
        tuple(words[i : i + n])
        for words in map(str.split, texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def write_stories(
    student: Student,
    tokenizer: Tokenizer,
    *,
    openings: Sequence[str],
    n_stories: int,
    **sampling: Any,
) -> list[Sample]:
    """Sample stories, spread evenly over the openings. sampling: max_new_tokens, temperature and
    seed of `generate`."""
    per_opening, rest = divmod(n_stories, len(openings))
    prompts = [
        opening for i, opening in enumerate(openings) for _ in range(per_opening + (i < rest))
    ]
    stories = generate(student, None, tokenizer, prompts, first_index=0, **sampling)
    return [Sample(story.opening, story.text, story.ended) for story in stories]


def story_measures(
    stories: Sequence[Sample], *, grader: Grader | None = None, corpus: Corpus | None = None
) -> dict[str, Any]:
    """Measures of stories, with 95 % intervals bootstrapped over stories.

    length_mean is in words, distinct_4 over all stories. story_clusters_10 is the number of
    clusters among the first ten stories to an opening, averaged over openings that have ten
    (NoveltyBench's distinct, with shared phrases instead of its classifier). ended_eos_share, with
    Wilson's interval, needs `ended` of every story. `grader` adds `score_means`, score_ci and
    unscored. `corpus` adds copied_share: longest phrase shared with it over words."""
    texts = [story.text for story in stories]
    by_opening: dict[str, list[str]] = {}
    for story in stories:
        by_opening.setdefault(story.opening, []).append(story.text)
    tens = [told[:10] for told in by_opening.values() if told[9:]]
    lengths = np.array([len(text.split()) for text in texts])
    measures: dict[str, Any] = {
        "stories": len(stories),
        "length_mean": float(lengths.mean()),
        "length_ci": mean_ci(lengths),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters_10": mean_of(len({*cluster_ids(ten)}) for ten in tens),
    }
    if all(story.ended for story in stories):
        ended = sum(story.ended == "eos" for story in stories)
        measures |= {
            "ended_eos_share": ended / len(stories),
            "ended_eos_ci": wilson(ended, len(stories)),
        }
    if grader:
        grades = grader.grade_each([(story.opening, story.text) for story in stories])
        sums = np.array(
            [sum(grade.scores.values()) for grade in grades if grade.scores], dtype=float
        )
        measures |= score_means(grades)
        measures |= {
            "score_ci": mean_and_ci(sums)[1],
            "unscored": sum(grade.score is None for grade in grades),
        }
    if corpus:
        shared = longest_shared(texts, corpus)
        measures["copied_share"] = fmean(
            n / max(words, 1) for n, words in zip(shared, lengths.tolist(), strict=True)
        )
    return measures


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def cluster_sizes(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    return sorted(Counter(cluster_ids(texts, threshold)).values(), reverse=True)


def cluster_ids(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    """The cluster of each text, numbered by first appearance. A text joins the first cluster whose
    founder's word 3-grams overlap its own by more than `threshold` (Jaccard; capitalised words
    count as one word), or founds one."""
    ids: list[int] = []
    sizes: list[int] = []  # number of 3-grams of each founder
    founders: dict[tuple[str, ...], list[int]] = {}  # clusters whose founder has the 3-gram
    for text in texts:
        grams = phrases(text, 3)
        shared = Counter(founder for gram in grams for founder in founders.get(gram, ()))
        near = [
            i for i, count in shared.items() if count > threshold * (len(grams) + sizes[i] - count)
        ]
        ids.append(min(near, default=len(sizes)))
        if not near:
            for gram in grams:
                founders.setdefault(gram, []).append(len(sizes))
            sizes.append(len(grams))
    return ids


def best_of_n(values: Sequence[Any], count: int) -> list[int]:
    """For each i < count, the index of the largest of values[i::count]. None (no score) is less
    than any value."""
    groups = (range(i, len(values), count) for i in range(count))
    return [max(group, key=lambda i: (values[i] is not None, values[i])) for group in groups]


def longest_shared(texts: Sequence[str], corpus: Corpus) -> list[int]:
    """Per text, the length in words of its longest phrase that also occurs in a document of the
    corpus. Words are separated by whitespace; phrases are compared by 64-bit hashes of their
    words."""
    vocabulary, stream = _words(corpus)
    rows = [
        np.array([vocabulary.get(word, 0) for word in text.split()], dtype=np.int64)
        for text in texts
    ]
    # -1 here, and 0 in the corpus, match nothing
    ours = np.concatenate([np.append(row, -1) for row in rows])
    owner = np.repeat(np.arange(len(rows)), [len(row) + 1 for row in rows])
    keys = np.random.default_rng(0).integers(1, 2**63, len(vocabulary) + 2, dtype=np.uint64)
    ours_at, theirs_at = np.flatnonzero(ours > 0), np.flatnonzero(stream)
    ours_hash, theirs_hash = keys[ours[ours_at]], keys[stream[theirs_at]]

    def longer(
        words: np.ndarray, at: np.ndarray, hashed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The phrases of `length` words at these positions, extended by one word where the text
        goes on."""
        inside = at + length < len(words)
        at, hashed = at[inside], hashed[inside]
        goes_on = words[at + length] > 0
        at, hashed = at[goes_on], hashed[goes_on]
        return at, hashed * np.uint64(6364136223846793005) + keys[words[at + length]]

    longest, length = np.zeros(len(rows), dtype=int), 1
    while len(ours_at):
        # A phrase can only grow where a shorter one matched, so few positions in the corpus remain
        # soon. They are filtered by 22 bits of their hashes: false positives do no harm, and
        # sorting the whole corpus takes seconds.
        sieve = np.zeros(2**22, dtype=bool)
        sieve[ours_hash >> np.uint64(42)] = True
        candidates = sieve[theirs_hash >> np.uint64(42)]
        theirs_at, theirs_hash = theirs_at[candidates], theirs_hash[candidates]
        shared = np.isin(ours_hash, theirs_hash)
        ours_at, ours_hash = ours_at[shared], ours_hash[shared]
        longest[owner[ours_at]] = length
        ours_at, ours_hash = longer(ours, ours_at, ours_hash)
        theirs_at, theirs_hash = longer(stream, theirs_at, theirs_hash)
        length += 1
    return longest.tolist()


@functools.lru_cache(maxsize=1)
def _words(corpus: Corpus) -> tuple[dict[str, int], np.ndarray]:
    """Word ids of a corpus, from 1, and its documents as ids, each followed by 0: (n,) int32."""
    vocabulary: dict[str, int] = {}
    documents = []
    for document in corpus.documents():
        ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in document.split()]
        documents.append(np.array([*ids, 0], dtype=np.int32))
    return vocabulary, np.concatenate(documents)
