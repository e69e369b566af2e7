"""A run's progress where its output is a terminal, and where it is a file."""

import sys

from tinystory.run import step_log
from tinystory.run.step_log import Progress


def shown(capsys, monkeypatch, terminal: bool) -> str:
    monkeypatch.setattr(step_log, "LINE_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Progress(total=600, unit="story", mininterval=0) as bar:
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
