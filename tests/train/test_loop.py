"""examples/loop.py: the loop on one page has the stories and the student of train_interact.py."""

import runpy

from conftest import ROOT, SHORT, assert_same_bits, cli
from fault_server import FaultServer

import train_interact as interact


def test_the_loop_on_one_page_learns_as_the_command_does(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grade = lambda story, n: f"{len(story) % 4} 1 {len(story) % 3}"  # noqa: E731
    options = dict(stories_per_step=6, max_new_tokens=16, steps=2, device="cpu", openings="Once")
    with FaultServer(grade) as server:
        loop = runpy.run_path(str(ROOT / "examples" / "loop.py"))
        loop["main"](str(place / "p"), server.url, **options)
        printed = capsys.readouterr().out
        more = cli(
            "--init {} --teacher-url {} --teacher-prompt grades --out i", place / "p", server.url
        )
        interact.main([*SHORT, *more, "--steps", "2", "--no-eval-graded"])
    assert printed.count("KL") == 2 and "Once" in printed
    assert_same_bits(tmp_path / "runs" / "loop", tmp_path / "i")
