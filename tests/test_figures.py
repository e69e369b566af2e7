"""Figures on the pages are those of the JSON that the lab wrote."""

import json
import re
from typing import Any

from conftest import ROOT

from lab import gain
from lab.gain import BEST_OF_4
from lab.intervals import interval

STUDENTS: list[dict[str, Any]] = json.loads((ROOT / "lab" / "gain.json").read_text())
# the arms of lab/gain.json: two seeds of interaction, and shuffled scores
_, FIRST, SECOND, SHUFFLED = STUDENTS[0]["gain"]


def text_of(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


def gains(words: int, name: str) -> list[float]:
    return [student["gain"][name] for student in STUDENTS if student["words"] == words]


def test_the_gain_of_fifteen_students_and_of_their_scores():
    gained = [(student["gain"][FIRST] + student["gain"][SECOND]) / 2 for student in STUDENTS]
    shuffled = [student["gain"][SHUFFLED] for student in STUDENTS]
    above = [mean - control for mean, control in zip(gained, shuffled, strict=True)]
    for page, sentence in {
        "lab/results/english.md": "interaction gains {}, which is {} more than shuffled scores",
        "lab/findings.md": "the gain is {}, of which {} is more than shuffled scores gain",
    }.items():
        assert sentence.format(interval(gained), interval(above)) in text_of(page)


def test_the_table_of_gains_by_words_of_pretraining():
    page = (ROOT / "lab/results/english.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) M \| (.*) \|$", page, re.M)
    by_words = gain.by_words(STUDENTS)
    assert [float(words) for words, _ in rows] == [words / 1e6 for words in by_words]
    for (_, cells), (words, group) in zip(rows, by_words.items(), strict=True):
        before = interval([student["rows"][student["before"]]["coherence"] for student in group])
        shown = [
            before,
            *(interval(gains(words, name)) for name in (FIRST, SECOND, SHUFFLED, BEST_OF_4)),
        ]
        assert cells.split(" | ")[:5] == [str(each) for each in shown]


def test_the_words_of_pretraining_that_interaction_stands_for(capsys):
    gain.print_equivalents(STUDENTS, (FIRST, BEST_OF_4))
    rows = capsys.readouterr().out.splitlines()
    row = next(row for row in rows if row.startswith("| 800,000 "))
    shown = re.findall(r"[\d.]+ \[[\d., ]+\]", row)
    text = text_of("lab/findings.md")
    assert f"stands for {shown[0]} times the words" in text
    assert f"the best of four for {shown[1]}" in text
