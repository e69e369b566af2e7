"""Expected scores under the teacher's token probabilities, and teachers that give no
probabilities."""

import json
import math

import pytest
from aiohttp import web
from fault_server import FaultServer, assert_one_clean_sentence, completion, error, weighed
from hypothesis import given
from hypothesis import strategies as st

from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.parse import expected_scores, parse_scores
from tinystory.teacher.prompt import CRITERIA

pytestmark = pytest.mark.usefixtures("short_pauses")


def tokens(*pieces, **chances):
    """Tokens with probability 1, except digits, which all have the same `chances` {d0: ..., d3:
    ...}."""
    likely = {name[1:]: math.log(chance) for name, chance in chances.items()}
    return [(piece, likely if piece.strip().isdigit() else {piece: 0.0}) for piece in pieces]


def test_an_expected_score_is_the_mean_over_the_candidate_digits():
    # Probability 0.2 is on tokens that are not scores; the rest is 1 to 3 on the digits 1 and 2.
    place = {
        "1": math.log(0.2),
        "2": math.log(0.5),
        " 2": math.log(0.1),
        "4": math.log(0.1),
        "x": math.log(0.1),
    }
    logprobs = [
        ("2", place),
        (" ", {" ": 0.0}),
        ("1", {"1": -0.5}),
        (" 3", {" 3": -1.0, "3": -1.0}),
    ]
    assert expected_scores("2 1 3", CRITERIA, logprobs) == {
        "readability": 1.75,
        "coherence": 1.0,
        "creativity": 3.0,
    }


@pytest.mark.parametrize(
    "pieces",
    [
        ["3", " ", "1", " ", "0"],
        ["3", ",", " 1", ",", " 0", ".", "<|eot_id|>"],
        [" ", "3", "\n", "1", "\n", "0", "\n"],
        [
            '{"',
            "creativity",
            '":',
            " ",
            "0",
            ', "',
            "readability",
            '":',
            "3",
            ', "coherence":',
            "1",
            "}",
        ],
        ["readability", ":", " 3", ", coherence:", "1", ", creativity:", " ", "0"],
    ],
)
def test_digits_are_found_in_every_form(pieces):
    reply = "".join(pieces).removesuffix("<|eot_id|>").strip()
    logprobs = [(piece, {piece: math.log(0.9), "2": math.log(0.1)}) for piece in pieces]
    assert expected_scores(reply, CRITERIA, logprobs) == {
        "readability": 2.9,
        "coherence": 1.1,
        "creativity": 0.2,
    }


def test_digits_in_names_are_not_scores():
    logprobs = tokens("q1", ": ", "2", ", ", "q2", ": ", "2", d2=0.5, d0=0.5)
    assert expected_scores("q1: 2, q2: 2", ["q1", "q2"], logprobs) == {"q1": 1.0, "q2": 1.0}


@pytest.mark.parametrize(
    "reply, logprobs",
    [
        ("2 1 3", []),
        ("2 1 3", tokens("2 1", " ", "3", d3=1.0)),  # no token is a digit alone
        ("2 1 3", tokens("2", " ", "1", d1=1.0)),  # not the whole reply
        ("2 1", tokens("2", " ", "1", d1=1.0)),  # no scores
        ("2 1 3", [(piece, {piece: -9999.0}) for piece in "2 1 3"]),  # no probability mass
        ('{"\\u0072eadability": 1, "coherence": 1, "creativity": 1}', None),
    ],
)
def test_without_probabilities_for_each_digit_there_is_no_score(reply, logprobs):
    logprobs = tokens(*reply, d1=1.0) if logprobs is None else logprobs
    assert expected_scores(reply, CRITERIA, logprobs) is None


@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(st.floats(-30, 0), min_size=4, max_size=4),
)
def test_an_expected_score_lies_within_the_scale_and_is_the_digit_if_that_is_certain(
    digits, logprobs
):
    reply = " ".join(map(str, digits))
    certain = [(char, {char: 0.0}) for char in reply]
    assert expected_scores(reply, CRITERIA, certain) == parse_scores(reply, CRITERIA)
    likely = dict(zip("0123", logprobs, strict=True))
    for score in expected_scores(reply, CRITERIA, [(char, likely) for char in reply]).values():
        assert 0 <= score <= 3


def graded(doubt=0.25):
    """A server that gives log-probabilities if they are asked for."""

    class Graded(FaultServer):
        def first(self):
            return weighed("2 1 3", doubt)

    return Graded(lambda story, n: weighed("2 1 3", doubt))


def test_expected_scores_are_used_and_cached(tmp_path):
    wanted = {"readability": 1.75, "coherence": 0.75, "creativity": 2.75}
    with graded() as server:
        for _ in range(2):
            with Teacher(server.url, logprobs=True, cache=tmp_path / "replies.jsonl") as teacher:
                (grade,) = teacher.grade("Once", ["A dog ran."])
            assert grade.scores == wanted and grade.reply == "2 1 3" and grade.reply_words == 3
            assert grade.score == pytest.approx(sum(wanted.values()) / 9)
        assert server.seen["A dog ran."] == 1
        asked = server.requests[-1]
        assert asked["logprobs"] is True and 4 <= asked["top_logprobs"] <= 20
        # integer scores have another key
        with Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher:
            assert teacher.grade("Once", ["A dog ran."])[0].scores == parse_scores(
                "2 1 3", CRITERIA
            )
        assert server.seen["A dog ran."] == 2 and "logprobs" not in server.requests[-1]


def test_a_reply_without_log_probabilities_is_retried_and_given_up():
    answers = {"A dog ran.": ["2 1 3", weighed("2 1 3", 0.5)], "A cat ran.": ["2 1 3"] * 3}
    with graded() as server, Teacher(server.url, logprobs=True) as teacher:
        server.script = lambda story, n: (
            answers[story][n] if story in answers else weighed("2 1 3", 0.5)
        )
        dog, cat = teacher.grade("Once", list(answers))
    assert dog.attempts == 2 and list(dog.scores.values()) == [1.5, 0.5, 2.5]
    assert (
        cat.scores is cat.score is None
        and cat.attempts == 3
        and "no scores in 3 replies" in cat.error
    )


@pytest.mark.parametrize("answer", ["2 1 3", "null", "wide", "text", "refuses"])
def test_a_server_without_log_probabilities_is_refused_before_the_first_story(answer):
    def odd(logprobs):
        choice = {"message": {"content": "2 1 3"}, "logprobs": logprobs}
        return web.json_response({"choices": [choice]})

    wide = {"content": [{"token": "2 1 3", "logprob": 0.0, "top_logprobs": []}]}
    text = {"content": [{"token": char, "logprob": "low"} for char in "2 1 3"]}
    answers = {"null": lambda: odd(None), "wide": lambda: odd(wide), "text": lambda: odd(text)}

    class Silent(FaultServer):
        async def _chat(self, request):
            if answer == "refuses" and "logprobs" in await request.json():
                return error(400, "logprobs is not supported")
            return await super()._chat(request)

    with Silent(lambda story, n: answers.get(answer, lambda: "2 1 3")()) as server:
        with Teacher(server.url, logprobs=True) as teacher, pytest.raises(UserError) as caught:
            teacher.probes()[0]
        assert_one_clean_sentence(caught, server.url, "no log-probabilities", "--teacher-logprobs")
        with Teacher(server.url) as teacher:
            assert teacher.probes()[0].scored


def test_the_fault_server_sends_log_probabilities_as_the_api_does():
    """The format of the fault server's completions is that of the API."""
    choice = json.loads(weighed("1 2", 0.5).text)["choices"][0]
    assert [place["token"] for place in choice["logprobs"]["content"]] == ["1", " ", "2"]
    assert "logprobs" not in json.loads(completion("1 2"))["choices"][0]
