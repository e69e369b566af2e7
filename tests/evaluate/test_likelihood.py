"""The controls without grades: a student's own likelihood as the score, and a constant."""

import pytest
import torch
from conftest import SHORT, metrics, read_lines
from fault_server import graded, written

import train_interact as interact
from tinystory.config import InteractConfig
from tinystory.evaluate.likelihood import MEAN, SPREAD, Likelihood
from tinystory.run.errors import Stop
from tinystory.student import checkpoint
from tinystory.student.generate import encode_opening
from tinystory.teacher.callable import load_score


def grader_of(student, tokenizer, max_new_tokens=16):
    config = InteractConfig(max_new_tokens=max_new_tokens)
    return Likelihood(student, tokenizer, ["Once upon a time,"], config)


def scores_of(grader, texts):
    return [grade.score for grade in graded(grader, "Once upon a time,", texts)]


def save_ender(run, folder):
    """The student of a run, changed so that all stories are empty."""
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(run))
    with torch.no_grad():
        student.unembedding[tokenizer.eos] = 1.0
        student.ln_f.weight.zero_()
        student.ln_f.bias.fill_(10.0)
    checkpoint.save(folder, student, tokenizer, history={}, state={}, counters={"step": 0})


def test_likelier_stories_score_higher(place):
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"))
    grader = grader_of(student, tokenizer)
    likely, unlikely = "Tom had a ball. Tom took the ball to the park.", "zyx qvw Jjj kkkx! 7 7 zq."
    better, worse = scores_of(grader, [likely, unlikely])
    assert 1 >= better > MEAN > worse >= 0
    assert scores_of(grader, [likely]) == [pytest.approx(better)]


def test_the_tokens_that_the_student_drew_are_scored_and_not_those_of_their_text(
    student, tokenizer
):
    grader = grader_of(student, tokenizer)
    text = "Tom took the ball to the park."
    prompt = encode_opening(tokenizer, "Once")
    fewest = tokenizer.encode(f" {text}")
    letters = [token for letter in f" {text}" for token in tokenizer.encode(letter)]
    assert len(letters) > len(fewest) and tokenizer.decode(letters) == f" {text}"
    drawn = [letters, [*fewest, tokenizer.eos]]
    for index, tokens in enumerate(drawn):
        grader.send(written(index, "Once", text, tokens))
    grades = grader.collect(Stop())
    for grade, tokens in zip(grades, drawn, strict=True):
        with torch.no_grad():
            logits = student.logits(student.hidden(torch.tensor([prompt + tokens])))
        logprobs = logits[0].double().log_softmax(-1)
        places = range(len(prompt), len(prompt) + len(tokens))
        mean = sum(
            float(logprobs[place - 1, token]) for place, token in zip(places, tokens, strict=True)
        ) / len(tokens)
        score = MEAN + SPREAD * (mean - grader.mean) / grader.spread
        assert grade.score == pytest.approx(min(max(score, 0), 1), abs=1e-3)


def test_a_text_longer_than_the_context_is_scored_by_its_end(student, tokenizer):
    grader = grader_of(student, tokenizer)
    story = tokenizer.encode(" Tom had a ball." * 40)
    prompt = encode_opening(tokenizer, "Once")
    context = student.config.context
    assert len(prompt + story) > context
    assert grader.mean_logprobs([(prompt, story)]) == grader.mean_logprobs([([], story[-context:])])
    (score,) = scores_of(grader, ["Tom had a ball." * 40])
    assert 0 <= score <= 1


def test_stories_whose_text_has_more_tokens_than_the_context_are_scored(place, tmp_path):
    """At this temperature most drawn bytes are no text, and each becomes a character of three."""
    init = ["--init", str(checkpoint.newest(place / "p")), *SHORT, "--steps", "1"]
    full = ["--max-new-tokens", "60", "--temperature", "100"]
    interact.main([*init, *full, "--reward", "likelihood", "--out", str(tmp_path / "i")])
    assert [record["unscored"] for record in metrics(tmp_path / "i")] == [0]


@pytest.mark.parametrize("grades", [[], ["--stories-per-step", "9", "--grades", "8"]])
def test_an_empty_story_has_the_score_0(place, tmp_path, grades):
    save_ender(place / "p", tmp_path / "start")
    init = ["--init", str(tmp_path / "start"), *SHORT, "--steps", "2", *grades]
    interact.main([*init, "--reward", "likelihood", "--out", str(tmp_path / "i")])
    assert [record["unscored"] for record in metrics(tmp_path / "i")] == [0, 0]
    stories = read_lines(tmp_path / "i" / "stories.jsonl")
    assert {story["story"] for story in stories} == {""}
    assert {story["reward"] for story in stories} == {0.0}


def test_a_constant_is_the_same_for_all():
    with load_score("constant") as score:
        assert score(["Once"] * 3, ["One.", "Two.", ""]) == [0.5] * 3
