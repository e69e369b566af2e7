"""A run with the user's own function as the teacher, and the terminal's output of the run: neither
is trusted."""

import itertools
import json

import pytest
import torch
from conftest import SHORT, SMALL, assert_same_bits, cli, fails, metrics, read_lines, story_record

import train_interact as interact
import train_pretrain as pretrain
from scripts import sample
from tinystory.evaluate import validation
from tinystory.report.before_after import summary
from tinystory.run.records import EVALUATIONS
from tinystory.run.text import is_blank
from tinystory.student import checkpoint
from tinystory.student.generate import Story

ESCAPES = "\x1b]0;owned\x07the \x1b[31mred\u202e \x9b2Jdog\nran."


def flags(place, out, body="pass"):
    """The flags of a run of two steps with a reward that counts words, and runs `body` in the
    second step."""
    reward = out.parent / f"{out.name}.py"
    reward.write_text(
        "import sys\ncalls = []\ndef f(opening, stories):\n    calls.append(stories)\n"
        f"    if len(calls) == 3:  # after the first evaluation and the first step\n        {body}\n"
        "    return [min(1.0, len(s.split()) / 12) for s in stories]\n"
    )
    init = ["--init", str(checkpoint.newest(place / "p"))]
    return [
        *init,
        *SHORT,
        *cli("--steps 2 --reward {}:f --teacher-timeout 99 --out {}", reward, out),
    ]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run with a reward that does nothing else."""
    out = tmp_path_factory.mktemp("callable") / "whole"
    interact.main(flags(place, out))
    return out


@pytest.mark.parametrize(
    "body, words",
    [
        ("sys.exit(0)", "line 6: SystemExit: 0"),
        ("import os; os._exit(0)", "it ended the process (exit code 0)"),
        ("return [10**400] * len(stories)", "returned 1000"),
        ("raise ValueError('\\x1b[31m')", "line 6: ValueError: [31m"),
    ],
)
def test_a_reward_that_ends_badly_is_one_sentence_and_no_step_is_lost(
    place, whole, tmp_path, capsys, body, words
):
    line = fails(interact.main, flags(place, tmp_path / "i", body), capsys)
    assert words in line and line.isprintable() and len(metrics(tmp_path / "i")) == 1
    assert checkpoint.newest(tmp_path / "i").name == "step_0000001"
    flags(place, tmp_path / "i")  # mended
    reward = f"{tmp_path / 'i.py'}:f"
    interact.main(["--resume", "--reward", reward, "--out", str(tmp_path / "i")])
    assert_same_bits(whole, tmp_path / "i")


def test_a_reward_cannot_change_how_the_student_learns(place, whole, tmp_path):
    body = "import torch; torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.manual_seed(1)"
    interact.main(
        flags(place, tmp_path / "i", f"{body}; torch.set_num_threads(1 + torch.get_num_threads())")
    )
    assert_same_bits(whole, tmp_path / "i")


BY_WORD = """
def whole(opening, stories):
    return [sum(each) for each in by_word(opening, stories)]
def by_word(opening, stories):
    return [[1 / (n + 1)] * n + [0] for n in map(len, map(str.split, stories))]
def early(opening, stories):  # everything for the first word
    return [[n / (n + 1), *[0] * n] for n in map(len, map(str.split, stories))]
"""


def test_scores_of_words_have_the_storys_reward_and_teach_otherwise(place, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(BY_WORD)
    runs = {}
    for name in ("whole", "by_word", "early"):
        out = tmp_path / name
        argv = cli("--init {} --reward {}:{} --out {}", place / "p", file, name, out)
        interact.main([*SHORT, *argv, "--steps", "1", "--learner", "gae"])
        runs[name] = out
    recorded = {}
    for name, out in runs.items():
        stories = read_lines(out / "stories.jsonl")
        recorded[name] = [(story["story"], round(story["reward"], 6)) for story in stories]
        for story in stories:
            by_word = story.get("by_word", [])
            words = story["words"]
            # the trainer does not ask about an empty story
            assert len(by_word) == (0 if name == "whole" or not words else words + 1)
            assert not by_word or sum(by_word) == pytest.approx(story["score"])
        assert_rewards_follow_from_records(out)
    assert recorded["whole"] == recorded["by_word"] == recorded["early"]
    # a story of one word has the same rewards from by_word and early
    if any(len(story.split()) > 1 for story, _ in recorded["whole"]):
        for one, other in itertools.combinations(runs.values(), 2):
            with pytest.raises(AssertionError):
                assert_same_bits(one, other)


def assert_rewards_follow_from_records(run):
    """Every story's reward, by the formula of docs/metrics.md, from the story's record and
    config.json."""
    options = json.loads((run / "config.json").read_text())["options"]
    d, w, L = (options[name] for name in ("diversity", "length_weight", "length_words"))
    records = [*read_lines(run / "stories.jsonl"), *read_lines(run / "evaluations.jsonl")]
    assert len(records) == 6 * options["steps"] + 4 * 2
    for record in records:
        quality = record["score"] * (1 - d + d * record["difference"])
        reward = (quality + w * min(record["words"] / L, 1)) / (1 + w)
        if record["ended"] == "length":
            reward *= options["unfinished"]
        assert record["reward"] == pytest.approx(reward, abs=1e-6)
    return records


def test_a_callables_score_of_each_story_is_on_record_beside_its_reward(whole):
    records = assert_rewards_follow_from_records(whole)
    for record in records:
        assert record["scores"] is None
        score = 0 if is_blank(record["story"]) else min(1, record["words"] / 12)
        assert record["score"] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("control", ["random", "constant", "likelihood"])
def test_a_controls_score_of_each_story_is_on_record(place, tmp_path, control):
    out = tmp_path / "i"
    argv = [*flags(place, out), "--reward", control, "--diversity", "0.5"]
    interact.main([*argv, "--length-weight", "0.4", "--unfinished", "0.7"])
    assert_rewards_follow_from_records(out)


@pytest.mark.parametrize("command", ["pretrain", "interact", "sample"])
def test_a_terminal_gets_no_escape_sequences_of_a_story(
    place, tmp_path, capsys, monkeypatch, command
):
    nothing = torch.zeros(0)
    story = Story(
        0, "Once", ESCAPES, nothing.long(), nothing.long(), nothing, nothing, nothing, "eos"
    )
    if command == "pretrain":
        monkeypatch.setattr(validation, "generate", lambda *_, **__: [story])
        monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: place / "cache")
        corpus = ["--corpus", str(place / "corpus.txt"), "--words", "500"]
        pretrain.main([*corpus, *SMALL, "--out", str(tmp_path / "p")])
    elif command == "sample":
        monkeypatch.setattr("tinystory.storyteller.generate", lambda *_, **__: [story])
        sample.main([str(place / "p"), "--stories", "1", "--device", "cpu"])
    else:
        records = [
            story_record(step, opening="\x1bOnce", story=f"{ESCAPES} {step}") for step in (0, 1)
        ]
        (tmp_path / EVALUATIONS).write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        print(summary(tmp_path))
    out = capsys.readouterr().out
    assert "dog" in out and out.replace("\n", "").isprintable()
