"""Blind comparison: each pair in both orders, ties counted one half, and the report's sentence."""

import json
from pathlib import Path

import pytest
from conftest import fails
from fault_server import FaultServer, answers

from lab import compare as command
from lab.preference import (
    FIRST,
    SECOND,
    TIE,
    StoryPair,
    both_orders,
    compare,
    compared_pairs,
    preference_line,
    run_pairs,
    win_rate,
)
from tinystory.evaluate.stories import read_samples
from tinystory.report.findings import read_findings
from tinystory.run.errors import UserError
from tinystory.run.log import RunLog
from tinystory.run.records import SAMPLES
from tinystory.student import checkpoint
from tinystory.teacher.named_protocols import load_protocol

PAIRS = [StoryPair("Once", f"a plain tale {i}.", f"a fine tale {i}.") for i in range(10)]


def likes(word):
    """A judge that gives 1 to the story with this word, whichever comes first, and 0 to the
    other."""
    return lambda samples: [1.0 if word in text.rpartition("\n")[2] else 0.0 for _, text in samples]


def test_the_story_that_the_judge_likes_wins_wherever_it_stands():
    assert compare(PAIRS, likes("fine")) == ([SECOND] * 10, 0.5)
    assert compare(PAIRS, likes("plain")) == ([FIRST] * 10, 0.5)


def test_who_prefers_a_place_decides_nothing():
    assert compare(PAIRS, lambda samples: [2 / 3] * len(samples)) == ([TIE] * 10, 1.0)


def test_position_bias_cancels():
    """A judge that prefers the lower story, but less so if it is the plain one."""

    def biased(samples):
        return [0.9 if "fine" in text.rpartition("\n")[2] else 0.7 for _, text in samples]

    assert compare(PAIRS, biased) == ([SECOND] * 10, 1.0)


def test_a_pair_without_an_answer_is_left_out():
    def silent_once(samples):
        return [
            None if sample == both_orders(PAIRS[1])[1] else likes("fine")([sample])[0]
            for sample in samples
        ]

    choices, _ = compare(PAIRS, silent_once)
    assert choices == [SECOND, None, *[SECOND] * 8] and win_rate(choices)["pairs"] == 9


def test_a_tie_counts_one_half():
    result = win_rate([FIRST, SECOND, TIE, TIE, None])
    assert result["rate"] == 0.5
    assert result["ci"][0] < 0.5 < result["ci"][1]
    assert result["pairs"] == 4
    line = preference_line("m", result, ("A", "B"))
    assert "m preferred B in 1 of 4 pairs, A in 1" in line and "win rate 0.50 [0." in line
    assert win_rate([SECOND] * 10)["ci"][0] > 0.7 and win_rate([None])["rate"] is None


def test_no_story_can_pretend_to_be_two():
    pair = StoryPair("Once", "one\n--------\nand two", "three")
    for _, text in both_orders(pair):
        assert text.count("-" * 16) == 1


def samples(run, pairs=PAIRS):
    run.mkdir(exist_ok=True)
    records = [
        {
            "when": when,
            "step": step,
            "index": i,
            "opening": pair.opening,
            "story": story,
            "reply": None,
            "scores": None,
            "score": None,
            "reward": None,
            "words": 2,
            "ended": "eos",
        }
        for i, pair in enumerate(pairs)
        for when, step, story in (("before", 0, pair.first), ("after", 9, pair.second))
    ]
    (run / SAMPLES).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_runs_pairs_are_its_stories_before_and_after(tmp_path):
    samples(tmp_path)
    assert run_pairs(tmp_path) == PAIRS
    samples(tmp_path, [StoryPair("Once", "the same", "the same")])
    with pytest.raises(UserError, match="finished interaction"):
        compared_pairs([tmp_path], read_samples)


def test_a_language_model_is_asked_about_each_pair_twice(tmp_path, capsys, short_pauses):
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({"device": "cpu"})
        log.metrics(step=9, reward_mean=0.5)
    samples(tmp_path)
    with FaultServer(lambda text, n: "3" if "fine" in text.rpartition("\n")[2] else "0") as server:
        server.first = lambda: "1"
        command.main([str(tmp_path), "--teacher-url", server.url])
        texts = {request["messages"][-1]["content"] for request in server.requests}
        system = {request["messages"][0]["content"] for request in server.requests}
    assert len(texts) == 1 + 2 * len(PAIRS) and system == {
        load_protocol(command.COMPARISON).instructions
    }
    printed = capsys.readouterr().out
    assert "first preferred the story after interaction in 10 of 10 pairs" in printed
    assert "second story in 50% of the answers" in printed
    (finding,) = read_findings(tmp_path)
    assert finding["title"].endswith("compared blindly by first")
    assert (
        "first preferred the story after interaction in 10 of 10"
        in (tmp_path / "report.html").read_text()
    )


def test_a_small_model_answers_with_a_probability(tmp_path, capsys, short_pauses):
    """It says yes to every pair, but with a higher probability if the fine story is below."""
    below = "--------\na fine"
    other = answers(lambda asked: 0.9 if below in asked else 0.7)
    prompt = ["--teacher-prompt", str(command.COMPARISON.with_name("preference.json"))]
    with FaultServer(other=other) as server:
        command.main([*files(tmp_path), *prompt, "--teacher-url", server.url])
    printed = capsys.readouterr().out
    assert "first preferred b.jsonl in 10 of 10 pairs" in printed
    assert "second story in 100% of the answers" in printed


def files(folder, pairs=PAIRS):
    """Two files of stories; the second has another order and an opening that the first lacks."""
    samples = (
        [{"opening": p.opening, "story": p.first} for p in pairs],
        [{"opening": "Never", "story": "a plain tale."}],
    )
    samples[1].extend({"opening": p.opening, "story": p.second} for p in pairs)
    for name, stories in zip("ab", samples, strict=True):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(story) + "\n" for story in stories)
        )
    return str(folder / "a.jsonl"), str(folder / "b.jsonl")


def test_stories_of_two_files_are_paired_by_their_openings(tmp_path, capsys, short_pauses):
    paths = files(tmp_path)
    assert compared_pairs([*map(Path, paths)], read_samples) == PAIRS
    with FaultServer(lambda text, n: "3" if "fine" in text.rpartition("\n")[2] else "0") as server:
        server.first = lambda: "1"
        command.main([*paths, "--teacher-url", server.url])
    out = capsys.readouterr().out
    assert "first preferred b.jsonl in 10 of 10 pairs, a.jsonl in 0, and neither in 0: win" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="different stories for the same openings"):
        compared_pairs([Path(paths[0])] * 2, read_samples)


def test_a_student_beside_a_file_writes_to_the_files_openings(
    student, tokenizer, tmp_path, capsys, short_pauses
):
    ours = checkpoint.save(
        tmp_path / "ours", student, tokenizer, history={}, state={}, counters={"step": 1}
    )
    (tmp_path / "a.jsonl").write_text(
        '{"opening": "Tom", "story": "plain"}\n{"opening": "Mia", "story": "plain"}\n'
    )
    more = ["--max-new-tokens", "4", "--device", "cpu", "--stories", "2"]
    with FaultServer(lambda text, n: "3" if text.rpartition("\n")[2] == "plain" else "0") as server:
        server.first = lambda: "1"
        command.main([str(tmp_path / "a.jsonl"), str(ours), *more, "--teacher-url", server.url])
    assert "preferred ours in 0 of 2 pairs, a.jsonl in 2" in capsys.readouterr().out


def test_wrong_comparisons_are_one_sentence(tmp_path, capsys):
    url = ["--teacher-url", "http://127.0.0.1:9/v1"]
    assert "or two students or files" in fails(command.main, ["a", "b", "c", *url], capsys)
    assert "finished interaction" in fails(command.main, [str(tmp_path), *url], capsys)
    assert "give --teacher-url" in fails(command.main, [*files(tmp_path)], capsys)
