"""lab/speedrun.py: what becomes a record."""

import pytest
from conftest import ROOT, fails

from lab import speedrun
from lab.speedrun import LEAST, MEASURES, MOST, Side, add_records, p_value

GOOD = dict.fromkeys(MEASURES, 1.0) | {name: least * 1.02 for name, least in LEAST.items()}
GOOD |= {name: most / 1.02 for name, most in MOST.items()}


@pytest.mark.parametrize(
    "values, least, p",
    [
        # quantiles of Student's distribution with 2 and 4 degrees of freedom
        ([1.0, 2.0, 3.0], 2.0 - 2.919986 * 3**-0.5, 0.05),
        ([1.0, 2.0, 3.0], 2.0 - 1.885618 * 3**-0.5, 0.10),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0 - 2.131847 * 0.5**0.5, 0.05),
        ([1.0, 2.0, 3.0], 2.0, 0.5),
        ([1.0, 2.0, 3.0], 2.0 + 1.885618 * 3**-0.5, 0.90),
    ],
)
def test_the_p_value_is_of_students_t(values, least, p):
    assert p_value(values, least) == pytest.approx(p, abs=1e-5)


def test_one_seed_or_equal_ones_have_no_p_value():
    assert p_value([0.7], 0.65) is None and p_value([0.7, 0.7], 0.65) is None


def side(commit, seconds, measures=GOOD):
    """Three runs with a median of `seconds` + 10."""
    runs = [{"pretraining": seconds * factor, "interaction": 10.0} for factor in (0.2, 1.0, 9.0)]
    return Side(commit, ROOT, runs, [measures] * 3)


def test_records_are_appended_each_with_its_ratio_to_the_one_before(tmp_path, monkeypatch):
    table = (ROOT / "lab" / "speedrun.md").read_text()
    records = tmp_path / "speedrun.md"
    records.write_text(table)
    monkeypatch.setattr(speedrun, "RECORDS", records)
    sides = [side("old", 90.0), side("newer", 40.0), side("newest", 30.0)]
    add_records(sides, ["half the words", "a shorter interaction"])
    first, second = records.read_text().removeprefix(table).splitlines()
    header = next(line for line in table.splitlines() if line.startswith("| record |"))
    assert first.count("|") == second.count("|") == header.count("|")
    assert "| newer |" in first and "| 50 | 0.500 |" in first
    assert "| newest |" in second and "| 40 | 0.800 |" in second
    assert second.endswith("| a shorter interaction |")
    numbers = [int(row.split("|")[1]) for row in (first, second)]
    assert numbers[1] == numbers[0] + 1


@pytest.mark.parametrize(
    "worse", [{"clusters": LEAST["clusters"] - 1}, {"best_bits": MOST["best_bits"] * 1.02}]
)
def test_a_side_that_breaks_a_rule_is_no_record_and_the_next_is_compared_with_the_one_before_it(
    tmp_path, monkeypatch, worse
):
    records = tmp_path / "speedrun.md"
    records.write_text("")
    monkeypatch.setattr(speedrun, "RECORDS", records)
    sides = [side("old", 90.0), side("newer", 10.0, GOOD | worse), side("newest", 40.0)]
    with pytest.raises(speedrun.UserError, match="no record: newer: "):
        add_records(sides, ["fewer stories", "half the words"])
    (row,) = records.read_text().strip().splitlines()
    assert "| newest |" in row and "| 0.500 |" in row and row.endswith("| half the words |")


def test_a_wrong_call_is_one_sentence(capsys):
    assert "--record needs one text per --against" in fails(
        speedrun.main, ["--record", "x"], capsys
    )
    assert "git worktree" in fails(speedrun.main, ["--against", "no-such-commit"], capsys)
