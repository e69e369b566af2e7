"""A user's function as the teacher: checked, bounded in time, and unable to end or change the
trainer."""

import os

import pytest

from tinystory.run.errors import UserError
from tinystory.teacher.callable import load_score


def scores(spec, openings=("o",), stories=("a",), timeout_s=300.0):
    with load_score(spec, timeout_s) as score:
        return score(openings, stories)


def test_the_scores_of_a_callable_are_checked(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "def ok(o, s): return [0.5 if x else None for x in s]\ndef short(o, s): return []\ndef wild(o, s): return [2]\n"
    )
    assert scores(f"{file}:ok", ["o", "o"], ["a", ""]) == [0.5, None]
    for name, words in (
        ("short", "returned 0 scores for 1"),
        ("wild", "returned 2;"),
        ("none", "no function 'none'"),
    ):
        with pytest.raises(UserError, match=words):
            scores(f"{file}:{name}")
    with pytest.raises(UserError, match="no Python file"):
        scores("nowhere.py:f")
    (tmp_path / "r.txt").write_text("")
    with pytest.raises(UserError, match="no Python file"):
        scores(f"{tmp_path / 'r.txt'}:f")


def test_a_callable_can_score_each_word(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import math, numpy, torch\n"
        "def lists(o, s): return [[-0.5, 1.0, 0, 0], (0.1, 0.2, 0.5), "
        "numpy.array([0.5, 0]), [torch.ones(()) / 2, numpy.float32(0.5)], 0.5, None]\n"
        "def tenths(o, s): return [[0.1] * (1 + len(x.split())) for x in s]\n"
        "def nan(o, s): return [[math.nan, 0]]\n"
        "def texts(o, s): return [['0.5', 0]]\n"
        "def nested(o, s): return [[[0.5], 0]]\n"
        "def huge(o, s): return [[10**400, 1 - 10**400, 0]]\n"
    )
    stories = ["a b  c", "a\nb.", " a", "a", "a b", "a"]
    assert scores(f"{file}:lists", ["o"] * 6, stories) == [
        (-0.5, 1.0, 0.0, 0.0),
        (0.1, 0.2, 0.5),
        (0.5, 0.0),
        (0.5, 0.5),
        0.5,
        None,
    ]
    assert scores(f"{file}:tenths", stories=["a " * 9]) == [(0.1,) * 10]  # 1.0 but for rounding
    for name, story, words in (
        ("tenths", "a " * 10, "that sum to a score from 0 to 1"),
        ("nan", "a", "that sum to a score from 0 to 1"),
        ("nan", "a b", "2 numbers for a story of 2 words"),
        ("texts", "a", "that sum to a score from 0 to 1"),
        ("huge", "a b", "numbers from -1000 to 1000"),
        ("nested", "a", "that sum to a score from 0 to 1"),
    ):
        with pytest.raises(UserError, match=words):
            scores(f"{file}:{name}", stories=[story])


def test_a_callable_can_import_a_file_beside_it(tmp_path, monkeypatch):
    """As `python FILE.py` can, from any folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "words_of.py").write_text("def count(text): return len(text.split())\n")
    file = tmp_path / "mine" / "r.py"
    file.write_text(
        "import words_of\ndef f(o, stories): return [words_of.count(x) / 10 for x in stories]\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in (file, "mine/r.py"):
        assert scores(f"{name}:f", stories=["a b"]) == [0.2]


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
    assert [scores(f"{file}:{name}", openings, stories) for name in ("each", "step")] == [
        expected
    ] * 2
    assert scores(f"{file}:count", openings, stories) == [0.4] * 4


F = "def f(o, s):\n    "


@pytest.mark.parametrize(
    "body, words",
    [
        (F + "return [1 / 0 for x in s]\n", "r.py, line 2: ZeroDivisionError: division by zero"),
        (F + "return json.loads('x')\nimport json\n", "r.py, line 2: JSONDecodeError"),
        ("\ndef f(o, s)\n    return [1]\n", "(r.py, line 2)"),
        (
            "import nowhere_at_all\n",
            "r.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        (F + "raise KeyError\n", "r.py, line 2: KeyError"),
        (F + "yield 0.5\n    raise OSError('no\\nroom')\n", "r.py, line 3: OSError: no room"),
        ("def f(o):\n    return [1]\n", "r.py: TypeError"),
        (F + "return '0'\n", "returned '0'; it must return a list"),
        (F + "return None\n", "returned None; it must return a list"),
        (F + "return 0.5\n", "TypeError"),
        (
            F + "return ['0.5']\n",
            "returned '0.5'; a score must be a number from 0 to 1, a list",
        ),
        (F + "return [float('nan')]\n", "returned nan; a score must be a number"),
        (F + "return [{}]\n", "returned {}; a score must be a number"),
        (F + "return [10**400]\n", "returned 1000"),
        (F + "return {0.5: 'a'}\n", "returned {0.5: 'a'}; it must return a list"),
        (F + "return {0.5}\n", "returned {0.5}; it must return a list"),
        (F + "return [True]\n", "returned True; a score must be a number from 0 to 1"),
        (
            "import numpy\n" + F + "return numpy.array([True])\n",
            "a score must be a number from 0 to 1, a list",  # the name varies by version
        ),
        (
            "import torch\n" + F + "return torch.tensor([True])\n",
            "returned tensor(True); a score must be a number from 0 to 1",
        ),
        (
            "class A:\n    def __repr__(self):\n        raise OSError('no')\ndef f(o, s):\n    return [A()]\n",
            "returned <A instance at",
        ),
        (
            "class A(OSError):\n    def __str__(self):\n        1 / 0\ndef f(o, s):\n    raise A\n",
            "line 5: A: <",
        ),
        (F + "raise OSError('\\x1b[31mred')\n", "line 2: OSError: [31mred"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        (F + "exit()\n", "line 2: SystemExit"),
        (
            "import os\ndef f(o, s):\n    os._exit(3)\n",
            "r.py: the function must return, but it ended the process (exit code 3)",
        ),
        (
            "import os\ndef f(o, s):\n    os.kill(os.getpid(), 9)\n",
            "r.py: the function must return, but it ended the process (exit code -9)",
        ),
        ("def g(o, s):\n    return [1]\n", "r.py has no function 'f'; it has g: write "),
    ],
)
def test_a_reward_file_that_fails_is_one_sentence_with_its_line(tmp_path, body, words):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(UserError) as caught:
        scores(f"{tmp_path / 'r.py'}:f")
    assert words in str(caught.value)
    assert "--reward" in str(caught.value)
    assert str(caught.value).isprintable()


def test_scores_of_any_library_are_numbers(tmp_path):
    (tmp_path / "r.py").write_text(
        "import numpy, torch\n"
        "def f(o, s): return numpy.array([0.25, 1.0], dtype='f')\n"
        "def g(o, s): return [torch.tensor(0.5), 1]\n"
    )
    assert scores(f"{tmp_path / 'r.py'}:f", ["o", "o"], ["a", "b"]) == [0.25, 1.0]
    assert scores(f"{tmp_path / 'r.py'}:g", ["o", "o"], ["a", "b"]) == [0.5, 1]


@pytest.mark.parametrize(
    "body",
    [
        "def f(o, s):\n    time.sleep(60)\nimport time\n",
        "def f(o, s):\n    while True: pass\n",
        "import time\ntime.sleep(60)\n",
        "def f(o, s):\n    while True:\n        try: time.sleep(60)\n        except Exception: pass\nimport time\n",
        "def f(o, s):\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass\nimport time\n",
    ],
)
def test_a_reward_that_hangs_is_one_sentence(tmp_path, body):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(
        UserError, match=r"r\.py.*: the function took more than 0\.05 s \(--teacher-timeout\)"
    ):
        scores(f"{tmp_path / 'r.py'}:f", timeout_s=0.05)


def test_a_file_alone_means_its_function_score(tmp_path):
    (tmp_path / "r.py").write_text(
        "def score(opening, stories):\n    return [0.25 for _ in stories]\n"
    )
    assert scores(str(tmp_path / "r.py")) == [0.25]
    (tmp_path / "r.py").write_text(
        "def mine(opening, stories):\n    return [0.25 for _ in stories]\n"
    )
    with pytest.raises(
        UserError, match=r"r\.py has no function 'score'; it has mine: write .*r\.py:mine$"
    ):
        scores(str(tmp_path / "r.py"))
    with pytest.raises(UserError, match=r"write --reward as FILE\.py or FILE\.py:FUNCTION"):
        scores("score")


def test_a_process_that_ends_between_two_calls_is_one_sentence(tmp_path):
    body = "import os, threading\ndef f(o, s):\n    threading.Thread(target=lambda: after()).start()\n    return [1]\n"
    body += "def after():\n    import time\n    time.sleep(0.1)\n    os._exit(7)\n"
    (tmp_path / "r.py").write_text(body)
    with (
        load_score(f"{tmp_path / 'r.py'}:f") as score,
        pytest.raises(UserError, match=r"\(exit code 7\)$"),
    ):
        for _ in range(10_000):
            score(["o"], ["a" * 100])


def test_a_call_keeps_what_an_earlier_one_left_and_its_process_ends_with_the_block(tmp_path):
    body = "import os\ncalls = []\ndef f(o, s):\n    calls.append(s)\n    return [len(calls) / 4, os.getpid() / 1e9]\n"
    (tmp_path / "r.py").write_text(body)
    with load_score(f"{tmp_path / 'r.py'}:f") as score:
        first, second = (score(["o", "o"], ["\ud800", "\u2028\n"]) for _ in range(2))
    assert (first[0], second[0]) == (0.25, 0.5) and first[1] == second[1]
    with pytest.raises(ProcessLookupError):
        os.kill(round(first[1] * 1e9), 0)
