"""A run's progress on a terminal, and in a file."""

import sys

from tinystory.run import step_log
from tinystory.run.step_log import ProgressBar


def shown(capsys, monkeypatch, terminal: bool) -> str:
    monkeypatch.setattr(step_log, "LINE_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with ProgressBar(total=600, unit="story", mininterval=0) as bar:
        for step in range(3):
            bar.set_description("rollout")
            for _ in range(200):
                bar.update()
            bar.end_step({"kl": step})
    return capsys.readouterr().err


def test_a_file_gets_a_line_per_step_and_a_terminal_a_bar(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, terminal=False).split("\n")
    assert [line.split(",")[0] for line in lines if line] == [
        f"rollout: {n} of 600 story" for n in (200, 400, 600)
    ]
    assert "\r" not in "".join(lines) and lines[2].endswith("kl=2")
    assert shown(capsys, monkeypatch, terminal=True).count("\r") > 100


def test_the_time_left_counts_whole_steps(monkeypatch):
    """Two stories a second are written, but with grading and learning a step of 10 takes 100 s."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now = [0.0]
    bar = ProgressBar(total=40, unit="story")
    bar.dynamic_ncols = lambda file: (100, 24)
    bar.start_t, bar._time = 0.0, lambda: now[0]
    for _ in range(10):
        now[0] += 0.5
        bar.update()
    assert "? left" in str(bar)
    now[0] = 100.0
    bar.end_step({})
    assert "05:00 left" in str(bar)


def words(monkeypatch, columns: int, **options) -> ProgressBar:
    """A progress bar of words on a terminal of so many columns, after a step that went beyond the
    total."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = ProgressBar(total=3000, unit="word", unit_scale=True, desc="pretraining: ", **options)
    bar.dynamic_ncols = lambda file: (columns, 24)
    bar.end_step({"loss": "5.123", "tok/s": "12,345", "val": "5.678"}, 3100)
    return bar


def test_a_bar_keeps_twenty_columns_and_drops_its_last_fields(monkeypatch):
    for columns in (200, 100, 80, 60):
        text = str(words(monkeypatch, columns))
        assert len(text) == columns
        assert text.count("█") >= step_log.BAR
        assert "100%" in text and "left" in text
    assert "val=5.678, 3.00k of 3.00k word" in str(words(monkeypatch, 200))
    narrow = str(words(monkeypatch, 70))
    assert "loss=5.123" in narrow and "tok/s" not in narrow


def test_a_step_beyond_the_total_ends_a_bar_that_still_knows_its_total(monkeypatch):
    text = str(words(monkeypatch, 200))
    assert "pretraining: 100%" in text and "3.00k of 3.00k word" in text

    monkeypatch.setattr(step_log, "LINE_S", 0.0)
    bar = ProgressBar(total=3000, unit="word", unit_scale=True, desc="pretraining: ")
    bar.lines = True
    bar.bar_format = step_log.LINE
    bar.end_step({"loss": "5.123"}, 3100)
    assert str(bar).startswith("pretraining: 3.00k of 3.00k word, ")
