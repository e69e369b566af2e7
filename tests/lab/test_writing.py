"""lab/writing.py: what a student learns from is what the teacher wrote, and nothing is done twice."""

import dataclasses
import json

import numpy as np
import torch
from conftest import SMALL, fails
from fault_server import FaultServer, answers

from lab import writing
from lab.writing import Lesson, first_words, pairs_of
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grade


class Reader:
    """Scores the number of words."""

    def coherence(self, stories):
        return np.array([len(story.split()) for _, story in stories], float)


def reply(asked: dict):
    """A continuation that begins with the opening, a correction, or an answer about a pair."""
    text = asked["messages"][-1]["content"]
    if "yes or no" in text:
        return answers(lambda text: 1 / (2 + len(text.rpartition("--------")[2]) % 97))(asked)
    if "child's continuation" in text:
        return "The fox went home. The end."
    return f"{text.splitlines()[-1]} A fox came by. They sang."


def test_a_student_learns_from_a_teachers_texts_once(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "Reader", lambda name: Reader())
    pretraining = (
        f"--corpus {place / 'corpus.txt'} --words 400 --val-fraction 0.9 {' '.join(SMALL)}"
    )
    openings = tmp_path / "openings.txt"
    openings.write_text("Once\nTom\nMia had\nBen ran\n")
    config = dataclasses.replace(
        writing.recipes.CONFIG, max_new_tokens=12, diversity=0.0, openings=str(openings)
    )
    monkeypatch.setattr(writing.recipes, "CONFIG", config)
    monkeypatch.setattr(writing.recipes, "OPENINGS", ["Once", "Tom", "Mia had"])
    monkeypatch.setattr(writing.recipes, "COREFERENCE", 2)
    seeds, unseen_texts = [], writing.recipes.unseen_texts
    monkeypatch.setattr(
        writing.recipes,
        "unseen_texts",
        lambda config: seeds.append(config.seed) or unseen_texts(config),
    )
    with FaultServer(other=reply) as server:
        argv = ["--out", str(tmp_path), "--seeds", "1", "2", "--pretrain", pretraining]
        argv += ["--teacher-url", server.url, "--teacher-model", "first", "--texts", "3"]
        argv += ["--pairs", "2", "--stories", "3"]
        writing.main(argv)
        # three continuations for both students, and three corrections for each
        texts = [body for body in server.others if not body.get("logprobs")]
        assert len(texts) == 9
        requests = len(server.others)
        printed = capsys.readouterr().out
        writing.main(argv)
        assert len(server.others) == requests
    assert capsys.readouterr().out.partition("| text |")[2] == printed.partition("| text |")[2]
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [each["seed"] for each in replies] == [0] * 3 + [1] * 3 + [2] * 3
    assert "| correction | 6 | 6 |" in printed and "\n| pair | 4 |" in printed
    assert seeds == [1, 2] * 2  # each student's own validation split, which it has not read
    for name in (
        "correction, read",
        "correction, prefer",
        "shuffled correction, both",
        "pair, prefer",
    ):
        assert f"\n| {name} | " in printed


def test_the_teachers_text_is_preferred_to_the_students():
    lessons = [Lesson("Once", "good", "bad"), Lesson("Then", "fine", "worse")]
    texts, rewards = pairs_of(lessons)
    assert texts == [("Once", "good"), ("Once", "bad"), ("Then", "fine"), ("Then", "worse")]
    assert rewards == [1, 0, 1, 0]


def test_of_two_stories_the_student_learns_the_one_that_the_judge_prefers():
    def story(text):
        return writing.Story(0, "Once", text, *[None] * 5, "eos")

    class Judge(writing.Grader):
        def grade_each(self, texts):
            lower = [text.rpartition("--------\n")[2] for _, text in texts]
            return [Grade(None, 0.9 if "good" in text else 0.4) for text in lower]

    first, second = map(story, ("good a", "bad b")), map(story, ("bad a", "good b"))
    lessons = writing.preferred([*first, story("same")], [*second, story("same")], Judge({}))
    assert lessons["pair"] == [Lesson("Once", "good a", "bad a"), Lesson("Once", "good b", "bad b")]
    assert {frozenset(each) for each in lessons["shuffled pair"]} == {
        frozenset(each) for each in lessons["pair"]
    }


def test_learning_makes_the_chosen_texts_likelier(place, tmp_path):
    start = checkpoint.newest(place / "p")
    student, tokenizer, _ = checkpoint.load(start, torch.device("cpu"))
    texts, rewards = pairs_of([Lesson("Tom ran.", "He saw a dog.", "The cat sat down.")] * 4)
    chosen, own = texts[:2]
    for name, options, learner, given in (
        ("read", writing.READ, writing.READING, ([chosen] * 4, [1.0] * 4)),
        ("prefer", writing.PREFER, writing.LEARNERS["dpo"], (texts, rewards)),
    ):
        writing.learn(start, tmp_path / name, options, learner, *given)
        taught, _, _ = checkpoint.load(checkpoint.newest(tmp_path / name), torch.device("cpu"))
        gains = [
            logprob(taught, tokenizer, text) - logprob(student, tokenizer, text)
            for text in (chosen, own)
        ]
        assert gains[0] > 0 if name == "read" else gains[0] > gains[1]


def logprob(student, tokenizer, text) -> float:
    """Log-probability of a text after its opening."""
    story = writing.as_story(tokenizer, 0, *text, student.config.context)
    batch = writing.collate([story], torch.device("cpu"))
    with torch.no_grad():
        logprobs, _ = writing.ppo.response_logprobs(student, batch)
    return float(logprobs.sum())


def test_a_text_that_stops_in_a_sentence_has_no_end_token(place):
    _, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"), torch.device("cpu"))
    whole, cut = (
        writing.as_story(tokenizer, 0, "Tom ran.", text, 64) for text in ("He sat.", "He sat on")
    )
    assert whole.tokens[-1] == tokenizer.eos and tokenizer.eos not in cut.tokens
    assert (whole.ended, cut.ended) == ("eos", "length")


def test_texts_are_taken_until_they_have_enough_words(tmp_path, capsys):
    assert first_words(["a b", "c d e", "f"], 3) == [("", "a b"), ("", "c d e")]
    assert first_words(["a b", "c"], 3) == [("", "a b"), ("", "c")]
    argv = ["--seeds", "1", "--teacher-url", "http://127.0.0.1:9/v1", "--teacher-model", "x"]
    assert "--seeds needs two seeds" in fails(writing.main, argv, capsys)
