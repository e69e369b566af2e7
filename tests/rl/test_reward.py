"""From a score to a reward: the paper's formula, the difference from other stories, and a callable as the teacher."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinystory.config import INTERACT_PRESETS, InteractConfig
from tinystory.rl.reward import best_of_n, differences, load_score, phrases, story_reward
from tinystory.run.errors import UserError

PAPER = InteractConfig(**INTERACT_PRESETS["paper"])


def test_reward_is_the_papers():
    for difference, ended in ((0.0, False), (1.0, True)):  # neither matters
        assert story_reward(PAPER, 7 / 9, difference, 45, ended) == pytest.approx((7 / 9 + 0.4 * 45 / 90) / 1.4)
        assert story_reward(PAPER, 1.0, difference, 90, ended) == 1.0
        assert story_reward(PAPER, 1.0, difference, 500, ended) == 1.0
        assert story_reward(PAPER, 0.0, difference, 0, ended) == 0.0


def test_sameness_and_a_cut_cost_a_part_of_the_reward():
    whole, half = (InteractConfig(length_weight=0.0, diversity=diversity, unfinished=0.5) for diversity in (1.0, 0.5))
    assert story_reward(whole, 0.8, 0.25, 50, True) == pytest.approx(0.8 * 0.25)
    assert story_reward(half, 0.8, 0.25, 50, True) == pytest.approx(0.8 * 0.625)
    assert story_reward(whole, 0.8, 1.0, 50, False) == pytest.approx(0.4)
    long = story_reward(InteractConfig(length_weight=0.4, length_words=90), 0.8, 1.0, 90, True)
    assert long == pytest.approx(1.2 / 1.4)


unit = st.floats(0, 1)


@given(unit, unit, unit, st.integers(0, 300), st.booleans(), unit, unit)
def test_a_reward_is_from_0_to_1_and_rises_with_the_difference(score, low, high, words, ended, diversity, unfinished):
    config = InteractConfig(diversity=diversity, unfinished=unfinished, length_weight=0.4, length_words=90)
    low, high = sorted((low, high))
    rewards = [story_reward(config, score, difference, words, ended) for difference in (low, high)]
    assert -1e-12 <= rewards[0] <= rewards[1] + 1e-12 <= 1 + 2e-12


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=30), st.integers(1, 9))
def test_stories_that_are_all_the_same_share_their_difference(words, n):
    assert differences([" ".join(words)] * n) == pytest.approx([1 / n] * n)


@given(st.lists(st.integers(4, 30), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_stories_that_share_no_phrase_are_wholly_different(lengths, random):
    stories = [" ".join(f"{chr(97 + i)}{random.randrange(5)}" for _ in range(n)) for i, n in enumerate(lengths)]
    assert differences(stories) == pytest.approx([1.0] * len(stories))


@given(st.lists(st.lists(st.sampled_from(["a", "b", "Tom", "Mia"]), max_size=12).map(" ".join), max_size=8))
def test_a_difference_does_not_depend_on_order_or_on_names(stories):
    result = differences(stories)
    assert all(0 <= each <= 1 for each in result)
    assert differences(stories[::-1]) == pytest.approx(result[::-1])
    assert differences([story.replace("Tom", "Peanut") for story in stories]) == pytest.approx(result)


def test_phrases_count_names_as_one_word_and_ignore_punctuation():
    assert phrases('Tom had a "big" ball.') == {("@", "had", "a", "big"), ("had", "a", "big", "ball")}
    assert phrases("Tom had a big ball") == phrases("Mia had a big, ball!") and phrases("too short here") == set()
    assert phrases("a b c", 2) == {("a", "b"), ("b", "c")}
    assert differences(["Tom saw a dog", "Mia saw a dog", "a cat sat down", "short"]) == [0.5, 0.5, 1.0, 0.0]


def test_the_scores_of_a_callable_are_checked(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "def ok(o, s): return [0.5 if x else None for x in s]\ndef short(o, s): return []\ndef wild(o, s): return [2]\n"
    )
    assert load_score(f"{file}:ok")(["o", "o"], ["a", ""]) == [0.5, None]
    for name, words in (("short", "gave 0 scores for 1"), ("wild", "gave 2;"), ("none", "no function 'none'")):
        with pytest.raises(UserError, match=words):
            load_score(f"{file}:{name}")(["o"], ["a"])
    with pytest.raises(UserError, match="no Python file"):
        load_score("nowhere.py:f")
    (tmp_path / "r.txt").write_text("")
    with pytest.raises(UserError, match="no Python file"):
        load_score(f"{tmp_path / 'r.txt'}:f")


def test_a_callable_of_openings_gets_the_whole_step_and_any_other_one_opening_at_a_time(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import torch\n"
        "def each(opening, stories): return [len(opening + s) / 100 for s in stories]\n"
        "@torch.inference_mode()\n"
        "def step(openings, stories): return [len(o + s) / 100 for o, s in zip(openings, stories)]\n"
        "def count(openings, stories): return [len(stories) / 10] * len(stories)\n"
    )
    openings, stories = ["a", "bb", "a", "ccc"], ["x", "xx", "xxx", ""]
    expected = [0.02, 0.04, 0.04, 0.03]
    assert [load_score(f"{file}:{name}")(openings, stories) for name in ("each", "step")] == [expected] * 2
    assert load_score(f"{file}:count")(openings, stories) == [0.4] * 4


@pytest.mark.parametrize(
    "body, words",
    [
        ("def f(o, s):\n    return [1 / 0 for x in s]\n", "r.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(o, s):\n    return json.loads('x')\nimport json\n", "r.py, line 2: JSONDecodeError"),
        ("\ndef f(o, s)\n    return [1]\n", "r.py, line 2: SyntaxError"),
        ("import nowhere_at_all\n", "r.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(o, s):\n    raise KeyError\n", "r.py, line 2: KeyError"),
        ("def f(o, s):\n    yield 0.5\n    raise OSError('no\\nroom')\n", "r.py, line 3: OSError: no room"),
        ("def f(o):\n    return [1]\n", "r.py: TypeError"),
        ("def f(o, s):\n    return '0'\n", "gave '0'; it must give a list"),
        ("def f(o, s):\n    return None\n", "gave None; it must give a list"),
        ("def f(o, s):\n    return 0.5\n", "TypeError"),
        ("def f(o, s):\n    return ['0.5']\n", "gave '0.5'; a score is a number from 0 to 1, or None"),
        ("def f(o, s):\n    return [float('nan')]\n", "gave nan; a score is a number"),
        ("def f(o, s):\n    return [{}]\n", "gave {}; a score is a number"),
        ("def f(o, s):\n    return [10**400]\n", "gave 1000"),
        (
            "class A:\n    def __repr__(self):\n        raise OSError('no')\ndef f(o, s):\n    return [A()]\n",
            "line 3: OSError",
        ),
        ("class A(OSError):\n    def __str__(self):\n        1 / 0\ndef f(o, s):\n    raise A\n", "line 5: A: <"),
        ("def f(o, s):\n    raise OSError('\\x1b[31mred')\n", "line 2: OSError: [31mred"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        ("def f(o, s):\n    exit()\n", "line 2: SystemExit"),
    ],
)
def test_a_reward_file_that_fails_is_one_sentence_with_its_line(tmp_path, body, words):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(UserError) as caught:
        load_score(f"{tmp_path / 'r.py'}:f")(["o"], ["a"])
    assert words in str(caught.value) and "--reward" in str(caught.value) and str(caught.value).isprintable()


def test_scores_of_any_library_are_numbers(tmp_path):
    (tmp_path / "r.py").write_text(
        "import numpy, torch\n"
        "def f(o, s): return numpy.array([0.25, 1.0], dtype='f')\n"
        "def g(o, s): return [torch.tensor(0.5), True]\n"
    )
    assert list(load_score(f"{tmp_path / 'r.py'}:f")(["o", "o"], ["a", "b"])) == [0.25, 1.0]
    assert list(load_score(f"{tmp_path / 'r.py'}:g")(["o", "o"], ["a", "b"])) == [0.5, 1]


@pytest.mark.parametrize(
    "body",
    [
        "def f(o, s):\n    time.sleep(60)\nimport time\n",
        "def f(o, s):\n    while True: pass\n",
        "import time\ntime.sleep(60)\n",
        "def f(o, s):\n    while True:\n        try: time.sleep(60)\n        except Exception: pass\nimport time\n",
        "def f(o, s):\n    try: time.sleep(60)\n    finally: time.sleep(60)\nimport time\n",
    ],
)
def test_a_reward_that_hangs_is_one_sentence(tmp_path, body):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(UserError, match=r"r\.py.*: it took more than 0\.05 s \(--teacher-timeout\)$"):
        load_score(f"{tmp_path / 'r.py'}:f", 0.05)(["o"], ["a"])
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_a_reward_does_to_torchs_settings_is_undone(tmp_path):
    (tmp_path / "r.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\n"
        "def f(o, s):\n    torch.set_default_dtype(torch.float16)\n    torch.set_default_device('meta')\n"
        "    torch.set_grad_enabled(False)\n    torch.set_num_threads(1 + torch.get_num_threads())\n    return [0.5]\n"
    )

    def settings():
        device = torch.empty(0).device
        return torch.get_default_dtype(), device, torch.is_grad_enabled(), torch.get_num_threads()

    before = settings()
    score = load_score(f"{tmp_path / 'r.py'}:f")
    assert torch.get_default_dtype() == before[0] and score(["o"], ["a"]) == [0.5]
    assert settings() == before


def test_the_best_of_n_is_the_largest_of_each_group_and_no_score_loses():
    assert best_of_n([0.1, 0.9, None, 0.5, 0.2, None], 3) == [3, 1, 2]
    assert best_of_n([0.4, None, 0.4, 0.0], 2) == [0, 3] and best_of_n([None, 3], 2) == [0, 1]
    assert best_of_n([(True, -9.0), (False, -1.0), (True, -2.0)], 1) == [2]
