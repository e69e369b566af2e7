"""Measure what fraction of stories is copied: the length of the longest phrase that a story shares
with a document of the corpus, divided by the story's length in words.

python scripts/sample.py runs/demo/interact --stories 200 --out ours.jsonl
python lab/copied.py ours.jsonl people.jsonl --corpus builtin

A .jsonl file of stories has an `opening` and a `story` in each line.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from tinystory.data.corpus import Corpus, open_corpus
from tinystory.evaluate.stories import read_samples
from tinystory.run.errors import command
from tinystory.run.options import script_parser


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--corpus", nargs="+", required=True, metavar="NAME|FILE")
    options = parser.parse_args(argv)
    corpus = open_corpus(options.corpus)
    for path in options.paths:
        texts = [story.text for story in read_samples(path)]
        print(f"{path}: copied fraction {copied_fraction(texts, corpus):.3f}")


def copied_fraction(texts: Sequence[str], corpus: Corpus) -> float:
    """The mean over texts of the longest shared phrase, divided by the number of words of the
    text."""
    shared = longest_shared(texts, corpus)
    words = [len(text.split()) for text in texts]
    return fmean(length / max(count, 1) for length, count in zip(shared, words, strict=True))


def longest_shared(texts: Sequence[str], corpus: Corpus) -> list[int]:
    """For each text, the length in words of the longest phrase that also occurs in a document of
    the corpus. Words are separated by whitespace. Phrases are compared by 64-bit hashes of their
    words."""
    vocabulary, corpus_words = _words(corpus)
    rows = []
    owners = []
    for i, text in enumerate(texts):
        ids = [vocabulary.get(word, 0) for word in text.split()]
        rows.append(np.array([*ids, 0]))
        owners.append(np.full(len(ids) + 1, i))
    words = np.concatenate(rows)
    owner = np.concatenate(owners)
    keys = np.random.default_rng(0).integers(1, 2**63, len(vocabulary) + 1, dtype=np.uint64)

    # The starts of phrases of `length` words, and the phrases' hashes.
    length = 1
    starts = np.flatnonzero(words)
    corpus_starts = np.flatnonzero(corpus_words)
    hashes = keys[words[starts]]
    corpus_hashes = keys[corpus_words[corpus_starts]]
    longest = np.zeros(len(texts), dtype=int)
    while len(starts):
        # A phrase can only grow where a shorter phrase matched, so soon few positions in the corpus
        # remain. The positions are filtered by 22 bits of the hashes: false positives do no harm,
        # and sorting the whole corpus would take seconds.
        sieve = np.zeros(2**22, dtype=bool)
        sieve[hashes >> np.uint64(42)] = True
        candidates = sieve[corpus_hashes >> np.uint64(42)]
        corpus_starts = corpus_starts[candidates]
        corpus_hashes = corpus_hashes[candidates]
        shared = np.isin(hashes, corpus_hashes)
        starts = starts[shared]
        hashes = hashes[shared]
        longest[owner[starts]] = length
        starts, hashes = _extended(words, starts, hashes, length, keys)
        corpus_starts, corpus_hashes = _extended(
            corpus_words, corpus_starts, corpus_hashes, length, keys
        )
        length += 1
    return longest.tolist()


def _extended(
    words: np.ndarray, starts: np.ndarray, hashes: np.ndarray, length: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and hashes of the phrases of `length` words that can be extended, extended by one
    word."""
    next_words = words[starts + length]  # exists: the corpus ends with 0, which is in no phrase
    goes_on = next_words > 0
    extended = hashes[goes_on] * np.uint64(6364136223846793005) + keys[next_words[goes_on]]
    return starts[goes_on], extended


@functools.lru_cache(maxsize=1)
def _words(corpus: Corpus) -> tuple[dict[str, int], np.ndarray]:
    """The words of a corpus with their ids, from 1, and the documents as ids, (n,) int32, each
    followed by 0."""
    vocabulary: dict[str, int] = {}
    documents = []
    for document in corpus.documents():
        ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in document.split()]
        documents.append(np.array([*ids, 0], dtype=np.int32))
    return vocabulary, np.concatenate(documents)


if __name__ == "__main__":
    main()
