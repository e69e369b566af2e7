"""lab/speedrun.py: whose commands it times, in which order, and what becomes a record."""

from pathlib import Path

import pytest
from conftest import ROOT, fails

from lab import speedrun
from lab.speedrun import RULES, Side, add_record, p_value, ratio

GOOD = {name: least * 1.02 for name, least in RULES.items()}


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


def test_both_commands_are_a_checkouts_own_with_an_empty_cache(tmp_path, monkeypatch):
    started = []

    def start(words, checkout, **variables):
        cache = Path(variables["TINYSTORY_CACHE"])
        started.append((words[1], checkout, words[-2:], [path.name for path in cache.iterdir()]))

    monkeypatch.setattr(speedrun, "start", start)
    checkout = tmp_path / "checkout"
    seconds = speedrun.timed_run(checkout, tmp_path / "run", 7)
    assert seconds.keys() == {"pretraining", "interaction"} and min(seconds.values()) >= 0
    assert started == [
        (name, checkout, ["--seed", "7"], ["kernels"])
        for name in ("train_pretrain.py", "train_interact.py")
    ]


def test_sides_take_turns_and_the_ratio_is_of_their_medians(tmp_path, monkeypatch, capsys):
    order = []
    seconds = {"old": [300.0, 100.0, 200.0], "new": [90.0, 110.0, 100.0]}

    def timed_run(checkout, folder, seed):
        order.append((checkout.name, seed))
        return {"pretraining": seconds[checkout.name][seed - 1], "interaction": 0.0}

    monkeypatch.setattr(speedrun, "start", lambda *_, **__: None)
    monkeypatch.setattr(speedrun, "timed_run", timed_run)
    monkeypatch.setattr(speedrun, "measured", lambda run: GOOD)
    sides = [Side("old", Path("old")), Side("new", Path("new"))]
    speedrun.race(sides, [1, 2, 3], tmp_path)
    assert order == [(name, seed) for seed in (1, 2, 3) for name in ("old", "new")]
    assert ratio(*sides) == 0.5
    speedrun.print_result(sides)
    assert "ratio of the medians: 0.500" in capsys.readouterr().out


def side(name, seconds, measures):
    runs = [{"pretraining": seconds, "interaction": 10.0}] * len(measures)
    return Side(name, ROOT, runs, measures)


def test_a_record_is_appended_with_the_next_number(tmp_path, monkeypatch):
    table = (ROOT / "lab" / "records.md").read_text()
    records = tmp_path / "records.md"
    records.write_text(table)
    monkeypatch.setattr(speedrun, "RECORDS", records)
    monkeypatch.setattr(speedrun, "git", lambda *_: "abc1234\n")
    old, new = side("old", 90.0, [GOOD] * 3), side("new", 40.0, [GOOD] * 3)
    add_record(old, new, "half the words")
    add_record(old, new, "again")
    added = records.read_text().removeprefix(table).splitlines()
    header = table.strip().splitlines()[-2 if "|---" in table.splitlines()[-1] else 0]
    numbers = [int(row.split("|")[1]) for row in added]
    assert len(added) == 2 and numbers[1] == numbers[0] + 1
    assert "| abc1234 |" in added[0] and "| 50 | 0.500 |" in added[0]
    assert added[0].endswith("| half the words |") and added[0].count("|") == header.count("|")


def test_a_run_below_a_rule_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "RECORDS", tmp_path / "records.md")
    worse = GOOD | {"clusters": 44.0}
    with pytest.raises(speedrun.UserError, match="no record"):
        add_record(side("old", 90.0, [GOOD]), side("new", 40.0, [worse]), "fewer stories")
    assert not (tmp_path / "records.md").exists()


def test_a_wrong_call_is_one_sentence(capsys):
    assert "--record needs --against" in fails(speedrun.main, ["--record", "x"], capsys)
    assert "git worktree" in fails(speedrun.main, ["--against", "no-such-commit"], capsys)
