"""Statistics of stories: n-grams, story clusters, scores; and files of stories by anybody."""

import json
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from tinystory.evaluate.stories import (
    Sample,
    cluster_ids,
    cluster_sizes,
    distinct_ngrams,
    read_samples,
    sample_stories,
    story_measures,
)
from tinystory.rl.reward import phrases
from tinystory.run.errors import UserError
from tinystory.student import generate
from tinystory.teacher.callable import CallableGrader
from tinystory.teacher.grade import Grade, Grader


def test_distinct_ngrams_tell_collapse():
    assert distinct_ngrams(["a b c d e", "f g h i"]) == 1.0
    assert distinct_ngrams(["a b c d e"] * 4) == 0.25
    assert distinct_ngrams(["a b", ""]) is None


def test_clusters_count_stories_told_again():
    scarf = "Tom lost his red scarf in the wood and a kind owl brought it back before the sun went down."
    cake = (
        "A baker made one huge cake but nobody came so all the mice of that town had some instead."
    )
    again = scarf.replace("Tom", "Mia").replace("red", "blue")
    assert cluster_sizes([scarf, cake, again, scarf]) == [3, 1]
    assert cluster_sizes([scarf] * 5) == [5]
    assert cluster_sizes([]) == []
    assert cluster_sizes([cake, scarf]) == [1, 1]
    assert cluster_sizes(["", cake, "", "too short"]) == [3, 1]  # texts without a phrase


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=12))
def test_a_story_joins_the_first_founder_that_it_is_near(texts):
    grams, founders, ids = [phrases(text, 3) or {()} for text in texts], [], []
    for a in grams:
        near = [i for i, b in enumerate(founders) if len(a & b) > 0.12 * len(a | b)]
        ids.append(near[0] if near else len(founders))
        founders += [] if near else [a]
    assert cluster_ids(texts) == ids
    assert cluster_sizes(texts) == sorted(Counter(ids).values(), reverse=True)


def test_story_measures(student, tokenizer, tmp_path):
    class Scorer(Grader):
        def grades(self, questions, stop=None):
            counts = Counter()
            grades = []
            for question in questions:
                i = counts[question.opening]
                counts[question.opening] += 1
                scores = {"readability": 1, "coherence": i % 2, "creativity": 0}
                grades.append(Grade(scores, sum(scores.values()) / 9) if i else Grade(None, None))
            return grades

    sampling = dict(
        openings=["Tom", "Mia had"], n_stories=9, max_new_tokens=12, temperature=1.0, seed=3
    )
    stories = sample_stories(student, tokenizer, **sampling)
    assert [story.opening for story in stories] == ["Tom"] * 5 + ["Mia had"] * 4
    measures = story_measures(stories, grader=Scorer({}))
    assert measures["stories"] == 9 and measures["unscored"] == 2
    # Four and three scored: 1, 0, 1, 0 and 1, 0, 1 for coherence.
    assert measures["score_mean"] == pytest.approx(1 + 4 / 7)
    assert measures["coherence_mean"] == pytest.approx(4 / 7)
    assert measures["score_ci"][0] <= measures["score_mean"] <= measures["score_ci"][1]
    assert 0 <= measures["ended_eos_share"] <= 1
    plain = story_measures(stories)
    assert all(plain[name] == measures[name] for name in plain) and "score_mean" not in plain
    assert sample_stories(student, tokenizer, **sampling | {"seed": 4}) != stories

    class Weighted(Grader):
        def grades(self, questions, stop=None):
            return [Grade({"humour": 3, "plot": 1}, 10 / 12)] * len(questions)

    weighted = story_measures(stories, grader=Weighted({}))  # with weights 3 and 1
    assert weighted["score_mean"] == pytest.approx(5)
    assert weighted["score_ci"] == pytest.approx((5, 5))
    silent = story_measures(
        stories, grader=CallableGrader(lambda openings, stories: [None] * len(stories), "")
    )
    assert silent["score_mean"] is None and silent["unscored"] == 9
    assert plain["story_clusters"] == len(cluster_sizes([story.text for story in stories]))
    assert story_measures([Sample("Tom", "had a red dog.")] * 5)["story_clusters"] == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_the_stories_on_a_terminal_alone(
    student, tokenizer, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(
        generate, "tqdm", lambda **options: tqdm(**options | dict(delay=0, mininterval=0))
    )
    sample_stories(
        student, tokenizer, openings=["Tom"], n_stories=5, max_new_tokens=3, temperature=1.0, seed=0
    )
    assert ("stories: 100%" in capsys.readouterr().err) == terminal


# ---- stories by anybody --------------------------------------------------------------------------


def write_samples_file(path, stories):
    path.write_text("".join(json.dumps(story) + "\n" for story in stories))
    return path


def test_stories_by_anybody_are_read_and_what_is_not_known_of_them_is_not_measured(
    student, tokenizer, tmp_path
):
    path = write_samples_file(
        tmp_path / "a.jsonl",
        [{"opening": "Once", "story": "Once a big dog ran.", "model": "gpt"}] * 2,
    )
    assert read_samples(path) == [Sample("Once", "a big dog ran.")] * 2
    measures = story_measures(read_samples(path))
    assert measures["distinct_4"] == 0.5 and measures["length_mean"] == 4
    assert "ended_eos_share" not in measures
    # A student's stories have the same measures when they are read from a file.
    samples = sample_stories(
        student,
        tokenizer,
        openings=["Tom", "Mia had"],
        n_stories=20,
        max_new_tokens=12,
        temperature=1.0,
        seed=0,
    )
    write_samples_file(
        path, [{"opening": s.opening, "story": s.text, "ended": s.ended} for s in samples]
    )
    assert story_measures(read_samples(path)) == story_measures(samples)


@pytest.mark.parametrize(
    "line", ['{"opening": "Once"}', '{"opening": "Once", "story": 3}', '{"story": "x"}\n']
)
def test_a_file_without_stories_is_one_sentence(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match='line 1 must be a JSON object with "opening" and "story"'):
        read_samples(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"there is no file .*nothing\.jsonl"):
        read_samples(tmp_path / "nothing.jsonl")
