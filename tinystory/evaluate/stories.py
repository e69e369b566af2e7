"""Stories by a student, another model or humans, and measures of stories: scores, diversity, length
and endings."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import mean_ci, wilson
from tinystory.rl.reward import phrases
from tinystory.run.errors import UserError
from tinystory.run.records import read_records
from tinystory.student.generate import generate
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader, score_means, shown_scores

# Two stories are in one cluster if the Jaccard overlap of their word 3-grams exceeds this value.
CLUSTER_OVERLAP = 0.12
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
    """A story. text: the continuation of the opening."""

    opening: str
    text: str
    ended: str | None = None  # "eos" or "length", if known


def read_samples(path: Path) -> list[Sample]:
    """The stories of a .jsonl file. Each line is an object with `opening`, `story` and, optionally,
    `ended`. `story` continues the opening; if it begins with the opening, the opening is removed.
    Raises UserError for any other file."""
    if not path.exists():
        raise UserError(f"there is no file {path}")
    stories = []
    records = list(read_records(path)) or [{}]  # so that an empty file is an error in line 1
    for number, record in enumerate(records, 1):
        match record:
            case {"opening": str(opening), "story": str(story)}:
                text = story.removeprefix(opening).strip()
                ended = record.get("ended")
                stories.append(Sample(opening, text, ended if isinstance(ended, str) else None))
            case _:
                raise UserError(
                    f'{path} line {number} must be a JSON object with "opening" and "story", both '
                    "text"
                )
    return stories


def distinct_ngrams(texts: list[str], n: int = 4) -> float | None:
    """Number of distinct word n-grams divided by the number of all word n-grams of the texts (Li et
    al. 2016, arXiv 1510.03055). Close to 0 if all texts are the same; None if there are no
    n-grams."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def sample_stories(
    student: Student,
    tokenizer: Tokenizer,
    *,
    openings: Sequence[str],
    n_stories: int,
    **sampling: Any,
) -> list[Sample]:
    """`n_stories` stories sampled from a student, spread evenly over the openings. sampling:
    max_new_tokens, temperature and seed of `generate`."""
    indices = sorted(i % len(openings) for i in range(n_stories))
    prompts = [openings[index] for index in indices]
    stories = generate(student, None, tokenizer, prompts, first_index=0, **sampling)
    return [Sample(story.opening, story.text, story.ended) for story in stories]


def story_measures(stories: Sequence[Sample], *, grader: Grader | None = None) -> dict[str, Any]:
    """Measures of stories, with 95 % intervals over stories.

    length_mean is in words. distinct_4 and story_clusters are over all stories. ended_eos_share is
    present if `ended` of every story is known, and has Wilson's interval. With a grader, there are
    also `score_means`, score_ci and unscored."""
    texts = [story.text for story in stories]
    lengths = [len(text.split()) for text in texts]
    measures: dict[str, Any] = {
        "stories": len(stories),
        "length_mean": fmean(lengths),
        "length_ci": mean_ci(lengths),
        "distinct_4": distinct_ngrams(texts),
        "story_clusters": len(cluster_sizes(texts)),
    }
    if all(story.ended for story in stories):
        ended = sum(story.ended == "eos" for story in stories)
        measures["ended_eos_share"] = ended / len(stories)
        measures["ended_eos_ci"] = wilson(ended, len(stories))
    if grader:
        grades = grader.grade_each([(story.opening, story.text) for story in stories])
        shown = shown_scores(grades)
        measures |= score_means(grades)
        measures["score_ci"] = mean_ci(shown) if shown else None
        measures["unscored"] = sum(grade.score is None for grade in grades)
    return measures


def cluster_sizes(texts: Sequence[str]) -> list[int]:
    """Number of texts in each cluster of `cluster_ids`, in descending order."""
    return sorted(Counter(cluster_ids(texts)).values(), reverse=True)


def cluster_ids(texts: Sequence[str]) -> list[int]:
    """The cluster of each text, numbered by first appearance. The first text of a cluster is the
    founder. A text joins the first cluster in which the word 3-grams of founder and text overlap by
    more than CLUSTER_OVERLAP; otherwise the text founds a new cluster. All texts of fewer than
    three words are one cluster. All capitalised words count as one word."""
    ids: list[int] = []
    sizes: list[int] = []  # number of 3-grams of each founder
    founders: dict[tuple[str, ...], list[int]] = {}  # 3-gram -> clusters with it in the founder
    for text in texts:
        grams = phrases(text, 3) or {()}
        shared: Counter[int] = Counter()  # number of 3-grams shared with each founder
        for gram in grams:
            shared.update(founders.get(gram, ()))
        near = []
        for founder, count in shared.items():
            union = len(grams) + sizes[founder] - count
            if count > CLUSTER_OVERLAP * union:
                near.append(founder)
        if near:
            ids.append(min(near))
            continue
        new = len(sizes)
        ids.append(new)
        sizes.append(len(grams))
        for gram in grams:
            founders.setdefault(gram, []).append(new)
    return ids
