"""Agreement between judges: the numbers of scikit-learn and scipy, and what they say of judges that are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.evaluate.agreement import Rater, agreement, weighted_kappa
from tinystory.evaluate.intervals import spearman
from tinystory.run.errors import UserError

NAMES = ("readability", "coherence", "creativity")
TABLES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60)


def judge(name, rows, words=lambda i: 20) -> Rater:
    """A rater of stories 0, 1, 2 ... with these scores."""
    rater = Rater(name)
    for i, row in enumerate(rows):
        rater.add("Once", f"{i} " + "word " * words(i), dict(zip(NAMES, row, strict=True)), None)
    return rater


def drawn(seed, n=80):
    return np.random.default_rng(seed).integers(0, 4, (n, 3)).tolist()


@given(TABLES)
def test_kappa_is_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics", reason="pip install 'tinystory[test]'")
    a, b = np.array(pairs).T
    with np.errstate(invalid="ignore"):
        theirs = metrics.cohen_kappa_score(a, b, weights="quadratic", labels=[0, 1, 2, 3])
    assert weighted_kappa(a.astype(float), b.astype(float)) == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@given(TABLES)
def test_spearman_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats", reason="pip install 'tinystory[test]'")
    a, b = np.array(pairs, dtype=float).T
    ours = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_kappa_by_hand():
    # Observed: squared distances 0, 1, 1, 0, mean 1/2. By chance: all pairs of (0, 1, 2, 3) and (0, 2, 1, 3), mean 5/2.
    assert weighted_kappa(np.array([0.0, 1, 2, 3]), np.array([0.0, 2, 1, 3])) == pytest.approx(1 - 0.5 / 2.5)
    assert math.isnan(weighted_kappa(np.ones(4), np.ones(4)))
    assert weighted_kappa(np.zeros(4), np.ones(4)) == 0


def test_a_judge_agrees_with_itself():
    found = agreement(judge("a", drawn(0)), judge("b", drawn(0)))
    assert found["judges"] == ["a", "b"] and found["stories"] == 80 and found["highest"] == 9
    for each in (found["sum"], *found["criteria"].values()):
        assert each["kappa"] == each["spearman"] == pytest.approx(1) and each["difference"] == 0 and each["equal"] == 1
    table = np.array(found["criteria"]["coherence"]["table"])
    assert table.sum() == 80 and np.trace(table) == 80


def test_judges_that_draw_lots_agree_by_chance_only():
    found = agreement(judge("a", drawn(0)), judge("b", drawn(1)))
    for each in (found["sum"], *found["criteria"].values()):
        for name in ("kappa", "spearman", "difference"):
            low, high = each[f"{name}_ci"]
            assert low < 0 < high and low <= each[name] <= high and high - low < 1.5


def test_a_generous_judge_keeps_the_order_and_loses_kappa():
    rows = drawn(2)
    found = agreement(judge("a", rows), judge("b", [[min(3, each + 1) for each in row] for row in rows]))
    assert found["sum"]["difference"] > 1.5 and found["sum"]["difference_ci"][0] > 1
    assert found["sum"]["spearman"] > 0.9 > 0.8 > found["sum"]["kappa"]
    table = np.array(found["criteria"]["creativity"]["table"])
    assert np.tril(table, -1).sum() == 0 and table[0, 1] > 0  # it never gives less


def test_a_judge_that_counts_words_is_seen():
    rows = drawn(3)
    by_length = [[min(3, i // 20)] * 3 for i in range(len(rows))]
    found = agreement(judge("a", rows, lambda i: i), judge("b", by_length, lambda i: i))
    assert found["length"]["second"] > 0.9 and found["length"]["second_ci"][0] > 0.8
    assert found["length"]["difference_ci"][0] > 0.3 and abs(found["length"]["first"]) < 0.3


def test_only_stories_and_criteria_that_both_scored_count():
    first, second = judge("a", drawn(4, 10)), judge("b", drawn(4, 6))
    second.ratings[next(iter(second.ratings))] = {"readability": 1, "humour": 2, "coherence": 0}
    del first.ratings[list(first.ratings)[5]]
    found = agreement(first, second)
    assert found["stories"] == 5 and list(found["criteria"]) == ["readability", "coherence"]


def test_a_callable_is_compared_by_the_sum():
    rows, whole = drawn(5), Rater("mine")
    first = judge("a", rows)
    for (opening, story), scores in first.ratings.items():
        whole.add(opening, story, None, sum(scores.values()) / 9)
    found = agreement(first, whole)
    assert found["criteria"] == {} and found["sum"]["kappa"] == pytest.approx(1)
    assert agreement(whole, first)["sum"]["difference"] == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_computed_is_none():
    found = agreement(judge("a", [[1, 1, 1]] * 4), judge("b", drawn(6, 4)))
    assert found["sum"]["spearman"] is None and found["sum"]["spearman_ci"] is None
    assert found["sum"]["kappa"] == pytest.approx(0)


def test_judges_without_a_common_story_are_the_users_error():
    with pytest.raises(UserError, match="no story in common"):
        agreement(judge("a", drawn(0, 3)), Rater("b", {("Once", "another"): 0.5}))
