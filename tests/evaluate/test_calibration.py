"""Calibration: teachers of known quality are reported as such, and the corrupted stories are as
described."""

import hashlib
import json
import math
import random
import signal
from collections import Counter

import numpy as np
import pytest
from fault_server import FaultServer, graded

from scripts import doctor
from tests.teacher.test_answers import with_logprobs
from tinystory.config import InteractConfig
from tinystory.evaluate import calibration
from tinystory.evaluate.calibration import (
    CHEAP,
    CHEAP_KINDS,
    FIRST_TEXTS,
    area_and_interval,
    calibrate,
    calibrated,
    known_texts,
    require,
    scaled,
    verdict,
)
from tinystory.evaluate.corruptions import (
    DULL,
    KINDS,
    REAL,
    SENTENCES,
    WORDS,
    known_stories,
    split_sentences,
    unseen_stories,
)
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import UserError

STORIES = known_stories(unseen_stories(300), CHEAP)


def knowing(told):
    """A teacher that knows the answer: the better the kind, the higher the score."""
    kinds = {(each.opening, each.story): each.kind for each in STORIES}
    best = {REAL: 1.0, SENTENCES: 0.6, WORDS: 0.2}
    return [best.get(kinds[each], 0.0) for each in told]


def lots(told):
    draw = random.Random(0)
    return [draw.randint(0, 9) / 9 for _ in told]


def length(told):
    return [min(1.0, len(story.split()) / 150) for _, story in told]


# Stories of known order


def by_opening():
    """Per opening the story of each kind."""
    table = {}
    for kind, opening, story in STORIES:
        table.setdefault(opening, {})[kind] = story
    return list(table.values())


def test_each_kind_is_what_it_says():
    counts = Counter(each.kind for each in STORIES)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) == CHEAP
    assert min(counts.values()) > CHEAP / 2
    for texts in by_opening():
        real = texts[REAL]
        sentences = split_sentences(real)
        for kind in (SENTENCES, WORDS):
            assert sorted(texts[kind].split()) == sorted(real.split())
        assert sorted(split_sentences(texts[SENTENCES])) == sorted(sentences)
        assert list(texts.values()).count(real) == 1
    assert len({each.story for each in STORIES if each.kind == "essay: full marks"}) == CHEAP
    lengths = [len(each.story.split()) for each in STORIES if each.kind == REAL]
    # without a spread no bias by length could be seen
    assert min(lengths) < 75 and max(lengths) > 120


def test_of_another_story_there_is_the_second_half():
    for texts in by_opening():
        sentences = split_sentences(texts[REAL])
        first, ending = " ".join(sentences[: len(sentences) // 2]), " ".join(sentences[-2:])
        assert texts["halves of two stories"].startswith(first)
        assert ending not in texts["halves of two stories"]


def test_some_words_are_replaced_and_all_others_stay():
    parts = []
    for texts in by_opening():
        real = texts[REAL].split()
        changed = texts.get("10 % of words replaced", texts[REAL]).split()
        assert len(real) == len(changed)
        parts.append(np.mean([a != b for a, b in zip(real, changed, strict=True)]))
    assert max(parts) < 0.35 and np.mean(parts) > 0.03


def test_a_corruption_does_not_depend_on_the_kinds_beside_it():
    some = known_stories(unseen_stories(300), CHEAP, (REAL, "halves of two stories"))
    assert some == [each for each in STORIES if each.kind in (REAL, "halves of two stories")]


def test_half_of_the_stories_are_of_the_corpus_and_a_poor_corpus_is_no_error():
    reals = [each for each in STORIES if each.kind == REAL]
    theirs = " ".join(unseen_stories(300))
    assert sum(each.story[:60] in theirs for each in reals) == CHEAP - CHEAP // 2
    assert len(known_stories(["too short"], 4, (REAL, WORDS))) == 8


def test_more_stories_than_there_are_is_a_sentence():
    with pytest.raises(UserError, match="stories to corrupt, not 5000: ask for fewer"):
        known_stories(["A dog ran. It barked. It sat. It slept. It woke."], 5000)


def test_the_same_seed_gives_the_same_texts():
    assert known_stories(unseen_stories(300), CHEAP) == STORIES
    assert known_stories(unseen_stories(300), CHEAP, seed=1) != STORIES


def test_a_quotation_is_kept_whole_when_sentences_are_split():
    expected = ['He said "No!"', "Then he went.", '"Why?" she asked.']
    assert split_sentences('He said "No!" Then he went. "Why?" she asked.') == expected


# Numbers


def test_the_area_counts_ties_as_one_half():
    assert area_and_interval([2.0, 3.0], [1.0, 2.0])["auc"] == (3 + 0.5) / 4
    assert area_and_interval([1.0] * 3, [1.0] * 5)["auc"] == 0.5


def test_a_teacher_that_knows_gets_every_pair_right():
    result = calibrate(knowing, STORIES)
    assert all(result["kinds"][kind]["auc"] == 1 for kind in KINDS[1:]) and result["best_auc"] == 1
    assert result["kinds"][REAL]["mean"] == 1 and result["unscored"] == 0
    beginning = "scores a story above sentences shuffled with probability 1.00 [0.7"
    assert verdict(result).startswith(beginning)


# Verdicts on teachers of known quality


@pytest.mark.parametrize(
    "teacher, says",
    [
        (lots, "cannot distinguish a story"),
        (length, "cannot distinguish a story"),
        (lambda told: [2 / 3] * len(told), "cannot distinguish a story"),
        (
            lambda told: [0.4 + 0.1 * (len(story) % 3) for _, story in told],
            "cannot distinguish a story",
        ),
        (lambda told: [None] * len(told), "gave no scores"),
        (lambda told: [1 - score for score in knowing(told)], 'are reversed: give "good": "no"'),
    ],
)
def test_a_teacher_that_cannot_judge_is_said_so_and_can_be_refused(teacher, says):
    result = calibrate(teacher, STORIES)
    assert says in verdict(result)
    require(result, 0.0)
    with pytest.raises(UserError, match=r"--min-auc 0\.8 .*the teacher"):
        require(result, 0.8)


def test_some_stories_without_a_score_are_left_out_and_counted():
    def forgetful(told):
        return [None if i % 5 == 0 else score for i, score in enumerate(knowing(told))]

    result = calibrate(forgetful, STORIES)
    assert result["best_auc"] == 1 and result["unscored"] == len(range(0, len(STORIES), 5))


# Commands


def _counts_words(story, n):
    total = min(9, len(story.split()) // 13)
    return f"{(total + 2) // 3} {(total + 1) // 3} {total // 3}"


def test_the_doctor_calibrates_an_endpoint(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "machine", lambda: [])
    monkeypatch.setattr(calibration, "FULL", 12)
    with FaultServer(_counts_words) as server:
        doctor.main(["--teacher-url", server.url, "--teacher-prompt", "grades", "--calibrate"])
        asked = len(server.requests)
    printed = capsys.readouterr().out
    assert "verdict    the teacher cannot distinguish a story" in printed
    assert "generic sentences" in printed
    known = known_stories(unseen_stories(1500), 12, (*KINDS, DULL))
    assert asked == 1 + len({each[1:] for each in known})  # the probe's, and each text


def test_the_doctor_says_the_whole_cost_first_and_each_result_at_once_and_keeps_what_it_has(
    capsys, monkeypatch, short_pauses
):
    """It is stopped by Ctrl-C while it asks in the third way, and the same command continues."""
    monkeypatch.setattr(doctor, "machine", lambda: [])
    measured = doctor.measured
    calls = []

    def stopped(grader, known):
        calls.append(grader)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(grader, known)

    monkeypatch.setattr(doctor, "measured", stopped)
    with FaultServer(
        lambda story, n: "3 3 3" if story in REALS else "1 0 1", other=_answers
    ) as server:
        argv = ["--teacher-url", server.url, "--calibrate", "--per-kind", "16"]
        with pytest.raises(SystemExit) as ended:
            doctor.main(argv)
        assert ended.value.code in (130, -signal.SIGINT)
        lines = capsys.readouterr().out.splitlines()
        forecast = next(i for i, line in enumerate(lines) if line.startswith("forecast"))
        assert "5 prompts x 144 texts: 720 stories, " in lines[forecast]
        asked = [line.split()[1] for line in lines if line.startswith("asking")]
        assert asked == ["event", "examples", "sense"]
        first_table = next(i for i, line in enumerate(lines) if "words shuffled" in line)
        assert forecast < first_table < lines.index("asking     examples")
        assert f"kept in {doctor.kept_replies(None)}" in lines[-1]

        sent = len(server.others)
        doctor.main(argv)
        assert len(server.others) - sent < 4 * 144  # sense, thread, and the probes
    command = capsys.readouterr().out.splitlines()[-1]
    for words in (f"--teacher-url {server.url}", "--teacher-prompt ", "--grades 64 ", "--steps 8 "):
        assert words in command
    assert command.startswith("next") and "--judge rubric" in command


def test_the_doctor_calibrates_a_callable(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "machine", lambda: [])
    doctor.main(["--reward", "random", "--calibrate", "--per-kind", "4"])
    assert "verdict    the teacher" in capsys.readouterr().out


def test_the_doctor_calibrates_the_builtin_teacher(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "machine", lambda: [])
    (tmp_path / "c.txt").write_text("\n\n".join(unseen_stories(1900)))
    doctor.main(["--calibrate", "--per-kind", "8", "--corpus", str(tmp_path / "c.txt")])
    lines = capsys.readouterr().out.splitlines()
    assert "built-in teacher" in lines[0]
    words = next(line for line in lines if "words shuffled" in line)
    assert words.count("[") == 1  # the interval of its area
    assert lines[-1].startswith("verdict    the teacher scores a story above")


KNOWN = known_texts(["builtin"])
REALS = {text.story for text in KNOWN if text.kind == REAL}


def _knows_reals(story, n):
    return "3 3 3" if story in REALS else "1 0 1"


def test_a_run_says_what_its_teacher_is_before_it_begins(short_pauses, tmp_path, capsys):
    replies = tmp_path / "replies.jsonl"
    with FaultServer(_knows_reals) as server:
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config, replies=replies) as grader:
            result = calibrated(config, grader, ["builtin"])["calibration"]
            asked = len(server.requests)
        # resumed: nothing anew
        with open_grader(config, replies=replies) as grader:
            assert calibrated(config, grader, ["builtin"])["calibration"] == result
            assert len(server.requests) == asked
    assert "calibration: the teacher scores a story above" in capsys.readouterr().out
    assert result["verdict"].startswith("scores a story above")
    assert result["stories"] == CHEAP * len(CHEAP_KINDS)


def test_a_teacher_at_chance_ends_the_run_before_it_spends_more(short_pauses, tmp_path):
    with FaultServer(_counts_words) as server:
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config, replies=tmp_path / "replies.jsonl") as grader:
            with pytest.raises(UserError, match=r"cannot distinguish a story.*--no-calibrate"):
                calibrated(config, grader, ["builtin"])
            config.min_auc = 0.7
            with pytest.raises(UserError, match=r"--min-auc 0\.7"):
                calibrated(config, grader, ["builtin"])
            config.calibrate, config.min_auc = False, 0.0
            assert calibrated(config, grader, ["builtin"]) == {}


def test_a_calibration_ends_when_its_first_texts_have_no_readable_answer(short_pauses):
    with FaultServer(other=lambda body: "Perhaps.") as server:
        config = InteractConfig(teacher_url=[server.url], teacher_prompt="event")
        with open_grader(config) as grader:
            probes = len(server.others)
            with pytest.raises(
                UserError, match="no score for the first 4 of 48 texts, but 'Perhaps"
            ):
                scaled(grader, ["builtin"])
            assert len(server.others) - probes <= FIRST_TEXTS * 8 * grader.attempts


# The scale of answers


def _answers(body):
    """A teacher's probabilities: high for a real story, and otherwise by the text."""
    text = body["messages"][-1]["content"].split("===")[2].strip()
    p = 0.9 if text in REALS else 0.1 + 0.6 * hashlib.sha256(text.encode()).digest()[0] / 255
    return with_logprobs("no", [("Yes", math.log(p)), ("no", math.log(1 - p))])


def test_the_scale_of_a_teachers_answers_belongs_to_the_run(short_pauses, tmp_path):
    """It is the same with and without a calibration, and is restored from what is recorded."""
    config = InteractConfig(teacher_prompt="event")
    with FaultServer(other=_answers) as server:
        config.teacher_url = [server.url]
        with open_grader(config) as grader:
            scale = scaled(grader, ["builtin"])
            assert list(scale) == ["event"] and scale["event"] != (0.0, 1.0)
            (score,) = [grade.score for grade in graded(grader, "Once", ["A dog ran."])]
            calibrated(config, grader, ["builtin"])
            assert graded(grader, "Once", ["A dog ran."])[0].score == score
        recorded = json.loads(json.dumps(scale))
        with open_grader(config) as grader:
            asked = len(server.others)
            assert scaled(grader, ["builtin"], recorded) == scale
            assert len(server.others) == asked
            assert graded(grader, "Once", ["A dog ran."])[0].score == score
        for damaged in ({}, {"sense": [0.0, 1.0]}, {"event": [0.0, 0.0]}, {"event": ["0", 1.0]}, 1):
            with open_grader(config) as grader:
                assert scaled(grader, ["builtin"], damaged) == scale


def test_a_callable_or_the_builtin_teacher_is_not_calibrated_unless_an_auc_is_required(capsys):
    config = InteractConfig(reward="random")
    with open_grader(config) as grader:
        assert calibrated(config, grader, ["builtin"]) == {}
        config.min_auc = 0.3
        assert calibrated(config, grader, ["builtin"])["calibration"]["unscored"] == 0
