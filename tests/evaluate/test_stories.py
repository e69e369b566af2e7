"""Statistics of stories: n-grams, story clusters, utility."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.evaluate.stories import distinct_ngrams, utility
from tinystory.rl.reward import cluster_ids, cluster_sizes, phrases


def test_distinct_ngrams_tell_collapse():
    assert distinct_ngrams(["a b c d e", "f g h i"]) == 1.0
    assert distinct_ngrams(["a b c d e"] * 4) == 0.25
    assert distinct_ngrams(["a b", ""]) is None


def test_clusters_count_stories_told_again():
    scarf = "Tom lost his red scarf in the wood and a kind owl brought it back before the sun went down."
    cake = "A baker made one huge cake but nobody came so all the mice of that town had some instead."
    again = scarf.replace("Tom", "Mia").replace("red", "blue")
    assert cluster_sizes([scarf, cake, again, scarf]) == [3, 1]
    assert cluster_sizes([scarf] * 5) == [5] and cluster_sizes([]) == [] and cluster_sizes([cake, scarf]) == [1, 1]
    assert cluster_sizes([scarf, again], threshold=0.9) == [1, 1]
    assert cluster_sizes(["", "", "too short"]) == [1, 1, 1]  # no phrases, so nothing in common


def test_utility_is_what_a_patient_reader_gets_of_new_stories():
    """A reader who goes on with chance 0.8 sees story i with chance 0.8 ** i."""
    scarf = "Tom lost his red scarf in the wood and a kind owl brought it back before the sun went down."
    cake = "A baker made one huge cake but nobody came so all the mice of that town had some instead."
    assert utility([scarf], [6.0]) == 6
    assert utility([scarf, scarf], [6.0, 9.0]) == pytest.approx(6 / 1.8)  # repeated: worth nothing
    assert utility([scarf, cake], [6.0, 9.0]) == pytest.approx((6 + 0.8 * 9) / 1.8)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=12))
def test_a_story_joins_the_first_founder_that_it_is_near(texts):
    grams, founders, ids = [phrases(text, 3) for text in texts], [], []
    for a in grams:
        near = [i for i, b in enumerate(founders) if len(a & b) > 0.12 * len(a | b)]
        ids.append(near[0] if near else len(founders))
        founders += [] if near else [a]
    assert cluster_ids(texts) == ids
    assert cluster_sizes(texts) == sorted(Counter(ids).values(), reverse=True)
