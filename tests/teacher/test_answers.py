"""Yes-or-no questions: the path from a server's probabilities to a story's score."""

import json
import math

import pytest
from aiohttp import web
from fault_server import FaultServer, answers, error, graded, with_logprobs

from scripts import doctor
from tinystory.config import InteractConfig
from tinystory.config.interaction import PROMPTS
from tinystory.evaluate.corruptions import (
    PLEA,
    PLEADING,
    REAL,
    WORDS,
    known_stories,
    unseen_stories,
    worked_examples,
)
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import UserError
from tinystory.teacher.answers import (
    YesNo,
    log_odds,
    log_odds_of_share,
    log_odds_of_token,
    parse_answer,
)
from tinystory.teacher.api import Reply
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grade, Submission
from tinystory.teacher.named_protocols import PROTOCOLS, load_protocol
from tinystory.teacher.prompt import TOP, Criterion

pytestmark = pytest.mark.usefixtures("short_pauses")
TWO = YesNo((Criterion("first", "Is it first?"), Criterion("second", "Is it second?", weight=3)))


# Numbers


def test_the_log_odds_sum_over_the_spellings_of_yes_and_of_no():
    listed = [
        ("Yes", 0.3),
        (" yes", 0.1),
        ("\u2581YES", 0.05),
        ("No", 0.2),
        ("\u0120no.", 0.1),
        ("The", 0.2),
    ]
    odds = log_odds_of_token([(token, math.log(p)) for token, p in listed])
    assert odds == pytest.approx(math.log(0.45 / 0.3))


def test_a_word_that_is_not_listed_is_as_likely_as_the_least_likely_token():
    listed = [("yes", math.log(0.9)), ("y", math.log(0.06)), ("The", math.log(0.01))]
    assert log_odds_of_token(listed) == pytest.approx(math.log(0.9 / 0.01))
    assert log_odds_of_token([("no", math.log(0.9)), ("N", -3.0)]) == pytest.approx(
        -3.0 - math.log(0.9)
    )
    assert log_odds_of_token([("yes", 0.0), ("no", -9999.0)]) == 20  # bounded


def test_a_word_that_is_not_listed_has_at_most_the_probability_that_is_left():
    assert log_odds_of_token([("yes", math.log(0.8))]) == pytest.approx(math.log(0.8 / 0.2))
    assert log_odds_of_token([("No", math.log(0.6)), ("Nope", math.log(0.3))]) == pytest.approx(
        math.log(0.1 / 0.6)
    )
    assert log_odds_of_token([("no", 0.0)]) == -20  # nothing is left


@pytest.mark.parametrize(
    "listed", [[], [("The", -0.1), ("Story", -2.5)], [("The", -0.01), ("yes", -5.0), ("no", -6.0)]]
)
def test_a_model_that_was_about_to_say_something_else_gave_no_answer(listed):
    assert log_odds_of_token(listed) is None


@pytest.mark.parametrize(
    "reply, answer",
    [("yes", True), ("Yes.", True), ("**NO**", False), ("No!\n", False)]
    + [("Yes, it does.", True), ("no dog ran", False), ('{"answer": "no"}', False)]
    + [(text, None) for text in ("", "yes and no", "Maybe", "The answer is yes.", "1 2 3", "ja")]
    + [(text, None) for text in ("No-one", "Yes/no", "yesterday", '{"answer": "yes", "x": "no"}')],
)
def test_an_answer_in_words_begins_with_yes_or_no(reply, answer):
    assert parse_answer(reply) is answer


def test_the_share_of_yes_gives_finite_log_odds():
    assert log_odds_of_share(8, 8) == pytest.approx(math.log(8.5 / 0.5))
    assert log_odds_of_share(1, 2) == 0 and log_odds_of_share(0, 1) == -log_odds_of_share(1, 1)
    assert log_odds([Reply("Yes."), Reply("no")]) == 0
    assert log_odds([Reply("Yes."), Reply("hm")]) is log_odds([Reply("Yes.", [])]) is None


def test_a_scale_standardises_the_log_odds_of_known_texts():
    def pair(odds):
        yes, no = -math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds))
        return [("yes", yes), ("no", no)]

    def scores(protocol, first, second):
        replies = {"first": [Reply("", pair(first))], "second": [Reply("", pair(second))]}
        return protocol.grade(Submission("Once", "A dog ran.", 0), replies).scores

    assert scores(TWO, 0.0, 0.0)["first"] == TOP / 2  # not measured: the probability of yes
    known = [{"first": 1.0, "second": 2.0}, {"first": 5.0, "second": 2.0}]
    protocol = TWO.fitted([Grade({}, 0.5, log_odds=odds) for odds in known])
    assert scores(protocol, 3.0, 2.0)["first"] == TOP / 2
    assert scores(protocol, 5.0, 2.0)["first"] == pytest.approx(TOP / (1 + math.exp(-1)))
    extreme = scores(protocol, -20.0, 20.0)
    assert extreme["first"] > 0 and extreme["second"] <= TOP
    assert TWO.scale == {} and protocol == TWO  # the named protocols stay as they are


# Requests


def test_a_story_is_asked_each_question_and_has_their_weighted_mean():
    chance = {"first": 0.5, "second": 0.8}
    other = answers(lambda asked: chance[asked.split("Is it ")[1].split("?")[0]])
    with FaultServer(other=other) as server, Teacher([server.url], protocol=TWO) as teacher:
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        body = server.others[-1]
    assert grade.log_odds == {"first": 0.0, "second": pytest.approx(math.log(4))}
    assert grade.scores == {"first": 1.5, "second": pytest.approx(0.8 * TOP)}
    assert grade.score == pytest.approx((0.5 + 3 * 0.8) / 4)
    assert grade.reply == "no no" and grade.reply_words == 2
    sampling = {"logprobs": True, "top_logprobs": 10, "max_tokens": 1, "temperature": 1.0}
    assert sampling.items() <= body.items() and "grammar" not in body


def test_the_questions_of_a_story_differ_at_the_end_only_and_are_asked_in_a_row():
    with (
        FaultServer(other=answers(lambda asked: 0.5)) as server,
        Teacher([server.url], protocol=TWO, concurrency=1) as teacher,
    ):
        probes = len(server.others)
        graded(teacher, "Once", ["A dog ran.", "A cat sat.", "A hen flew."])
        conversations = [body["messages"] for body in server.others[probes:]]
    for first, second in zip(conversations[::2], conversations[1::2], strict=True):
        assert first[:-1] == second[:-1]
        before = first[-1]["content"].removesuffix("Is it first? Answer yes or no.")
        assert before == second[-1]["content"].removesuffix("Is it second? Answer yes or no.")


def test_a_server_that_lists_fewer_tokens_is_asked_for_fewer():
    def other(body):
        if body.get("top_logprobs", 0) > 5:
            return error(400, "top_logprobs must be less than or equal to 5")
        return answers(lambda asked: 0.2)(body)

    with FaultServer(other=other) as server, Teacher([server.url], protocol=TWO) as teacher:
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        assert teacher.probes[0].top_logprobs == server.others[-1]["top_logprobs"] == 5
    assert grade.log_odds["first"] == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("refuses", [True, False])
def test_without_log_probabilities_the_answer_is_the_share_of_yes(refuses, capsys):
    drawn = []

    def other(body):
        if body.get("logprobs") and refuses:
            return error(400, "logprobs is not supported by this model")
        drawn.append(body.get("seed", 1))
        return "Yes." if drawn[-1] % 4 else "no"  # in silence, if they are asked for

    one = YesNo((Criterion("first", "Is it first?"),))
    with FaultServer(other=other) as server, Teacher([server.url], protocol=one) as teacher:
        (probe,) = teacher.probes
        drawn.clear()
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert probe.top_logprobs == 0 and "fraction of yes" in capsys.readouterr().out
    assert len(set(drawn)) == len(drawn) == YesNo.draws
    yes = sum(seed % 4 > 0 for seed in drawn)
    assert grade.log_odds["first"] == pytest.approx(
        math.log((yes + 0.5) / (YesNo.draws - yes + 0.5))
    )


@pytest.mark.parametrize(
    "reply",
    [
        "It is a story about a dog, so",
        with_logprobs("The", [("The", -0.1), ("A", -2.5)]),
        with_logprobs("", [("yes", float("nan")), ("no", float("-inf")), ("x", "y"), ("z", 3)]),
    ],
)
def test_a_reply_that_is_no_answer_gives_no_score(reply):
    def other(body):
        if "A dog" not in body["messages"][-1]["content"]:
            return answers(lambda asked: 0.5)(body)
        if isinstance(reply, str):
            return reply
        return web.Response(text=reply.text, content_type="application/json")

    with FaultServer(other=other) as server, Teacher([server.url], protocol=TWO) as teacher:
        dog, cat = graded(teacher, "Once", ["A dog ran.", "A cat sat."])
        # Equal requests have equal probabilities, so each is sent once.
        asked = [body["messages"][-1]["content"] for body in server.others]
    assert (dog.score, dog.scores, dog.log_odds) == (None, None, None) and "no score" in dog.error
    assert sum("A dog" in text for text in asked) == 2
    assert cat.score == 0.5


def unsure(text, mass=0.05):
    """A server whose model replies with `text`, although yes and no are improbable."""

    def other(body):
        if "A dog" in body["messages"][-1]["content"]:
            return with_logprobs(text, [("The", math.log(1 - mass)), (text, math.log(mass))])
        return answers(lambda asked: 0.5)(body)

    return other


@pytest.mark.parametrize("text", ["yes", "no"])
def test_a_sampled_word_is_no_answer_where_log_probabilities_were_requested(text):
    with FaultServer(other=unsure(text)) as server, Teacher([server.url], protocol=TWO) as teacher:
        dog, cat = graded(teacher, "Once", ["A dog ran.", "A cat sat."])
    assert dog.score is None and cat.score == 0.5


def test_a_server_that_has_lost_its_log_probabilities_gives_no_scores(tmp_path):
    with FaultServer(other=answers(lambda asked: 0.5)) as server:
        for stories in (["A cat sat."], ["A cat sat.", "A hen flew."]):
            with Teacher([server.url], protocol=TWO, cache=tmp_path / "replies.jsonl") as teacher:
                grades = graded(teacher, "Once", stories)
            server.other = lambda body: "Yes"  # the server is restarted without them
    assert [grade.score for grade in grades] == [0.5, None]


def test_servers_that_give_no_log_probabilities_are_left_out_beside_one_that_does(capsys):
    with (
        FaultServer(other=answers(lambda asked: 0.8)) as server,
        FaultServer(other=lambda body: "Yes.") as other,
        Teacher([other.url, server.url], protocol=TWO) as teacher,
    ):
        probes = len(other.others)
        grades = graded(teacher, "Once", [f"Dog {i} ran." for i in range(20)])
        assert len(other.others) == probes
    assert [grade.log_odds["first"] for grade in grades] == pytest.approx([math.log(4)] * 20)
    assert f"{other.url} gives no log-probabilities, unlike" in capsys.readouterr().out


def test_one_candidate_is_no_list_of_log_probabilities():
    """Servers that were asked for 20 tokens and list the sampled one alone."""
    one = lambda body: with_logprobs("Yes", [("Yes", -0.1)]) if body.get("logprobs") else "Yes"  # noqa: E731
    with FaultServer(other=one) as server, Teacher([server.url], protocol=TWO) as teacher:
        assert teacher.probes[0].top_logprobs == 0
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        assert grade.log_odds["first"] == pytest.approx(math.log(8.5 / 0.5))


def test_answers_are_replayed_to_the_last_bit_without_a_server(tmp_path):
    cache = tmp_path / "replies.jsonl"
    stories = [f"Story {i}." for i in range(5)]
    chance = answers(lambda asked: 1 / (3 + len(asked) % 7))
    with FaultServer(other=chance) as server:
        with Teacher([server.url], protocol=TWO, cache=cache) as teacher:
            grades = graded(teacher, "Once", stories)
        url, asked = server.url, len(server.others)
    with Teacher([url], ["first"], protocol=TWO, cache=cache) as teacher:
        again = graded(teacher, "Once", stories)
    assert [(each.scores, each.score) for each in again] == [
        (each.scores, each.score) for each in grades
    ]
    assert asked == len(server.others)


def test_half_of_a_storys_answers_are_not_asked_for_again(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with FaultServer(other=answers(lambda asked: 0.5)) as server:
        with Teacher([server.url], protocol=TWO, cache=cache) as teacher:
            graded(teacher, "Once", ["A dog ran."])
        lines = cache.read_text().splitlines(keepends=True)
        cache.write_text("".join(lines[:-1]))  # killed between the two questions
        before = len(server.others)
        with Teacher([server.url], protocol=TWO, cache=cache) as teacher:
            (grade,) = graded(teacher, "Once", ["A dog ran."])
        assert len(server.others) == before + 1 and grade.score == 0.5


# Templates


def test_no_is_the_good_answer_to_a_question_that_says_so(tmp_path):
    path = tmp_path / "prompt.json"
    question = {"name": "impossible", "question": "Is anything impossible?", "good": "no"}
    path.write_text(json.dumps({"criteria": [question]}))
    protocol = load_protocol(path)
    with (
        FaultServer(other=answers(lambda asked: 0.8)) as server,
        Teacher([server.url], protocol=protocol) as teacher,
    ):
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        assert grade.scores["impossible"] == pytest.approx(0.2 * TOP)
        assert grade.log_odds["impossible"] == pytest.approx(math.log(4))  # of yes, as asked
        known = [Grade({}, 0.5, log_odds={"impossible": odds}) for odds in (1.0, 5.0)]
        teacher.options.protocol = protocol.fitted(known)
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        expected = TOP / (1 + math.exp((math.log(4) - 3) / 2))
        assert grade.scores["impossible"] == pytest.approx(expected)


def test_worked_examples_come_before_the_story_and_are_no_known_texts():
    documents = unseen_stories(40)
    examples = worked_examples(documents)
    protocol = YesNo(TWO.criteria, shows_examples=True).with_examples(lambda: examples)
    messages = protocol.messages("Once", "A dog ran.", "===")["first"]
    expected = ["system", *["user", "assistant"] * 2, "user"]
    assert [message["role"] for message in messages] == expected
    assert [messages[2]["content"], messages[4]["content"]] == ["yes", "no"]
    assert all(
        message["content"].endswith("first? Answer yes or no.") for message in messages[1::2]
    )
    # A server's prefix cache reads them once: they are equal for every story and fence.
    others = protocol.messages("Then", "A cat.", "=#=")["first"]
    assert others[:-1] == messages[:-1]
    # If no is the good answer, the examples say so.
    reverse = YesNo((Criterion("bad", "Is it bad?", good="no"),), shows_examples=True)
    messages = reverse.with_examples(lambda: examples).messages("Then", "A cat.", "=#=")["bad"]
    assert [messages[2]["content"], messages[4]["content"]] == ["no", "yes"]
    known = {story.story for story in known_stories(documents, 20)}
    assert known.isdisjoint(example.story for example in examples)


def test_a_plea_has_the_words_of_a_shuffled_story():
    texts = known_stories(unseen_stories(40), 6, (REAL, WORDS, PLEA))
    shuffled = [text.story for text in texts if text.kind == WORDS]
    pleas = [text.story for text in texts if text.kind == PLEA]
    assert pleas == [story + PLEADING for story in shuffled]


@pytest.mark.parametrize(
    "value",
    [
        {"criteria": [{"name": "a", "question": "Q?"}], "examples": 1},
        {"criteria": [{"name": "a", "question": "Q?", "levels": list("abcd")}], "examples": True},
        {
            "criteria": [
                {"name": "a", "question": "Q?"},
                {"name": "b", "question": "Q?", "levels": list("abcd")},
            ]
        },
        {"criteria": [{"name": "a", "question": "Q?", "levels": []}]},
        {"criteria": [{"name": "a"}]},
        {"criteria": [{"name": "a", "question": "Q?", "good": "maybe"}]},
        {"criteria": [{"name": "a", "question": "Q?", "good": ["no"]}]},
        {"criteria": [{"name": "a", "question": "Q?", "good": "no", "levels": list("abcd")}]},
        {"criteria": [{"name": "a", "question": "Q?" * 400, "goal": "no"}]},
    ],
)
def test_a_template_that_cannot_be_asked_is_one_whole_sentence(tmp_path, value):
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"nor a valid template file: .*") as caught:
        load_protocol(path)
    assert str(caught.value).endswith(('optionally "system"', "nothing else is allowed"))
    assert len(str(caught.value)) < 700


def test_a_template_has_a_name_or_a_file(tmp_path):
    assert load_protocol("event") is PROTOCOLS["event"]
    path = tmp_path / "prompt.json"
    criteria = [{"name": "a", "question": "Is it?", "weight": 2}]
    path.write_text(json.dumps({"criteria": criteria, "examples": True, "preface": "Hello."}))
    wanted = YesNo((Criterion("a", "Is it?", weight=2.0),), "Hello.", shows_examples=True)
    assert load_protocol(path) == wanted


def test_babylm_does_not_let_probabilities_reach_the_student():
    config = InteractConfig(
        preset="babylm-2026-strict", teacher_prompt="sense", teacher_url=["http://127.0.0.1:9"]
    )
    with pytest.raises(UserError, match=r"--teacher-prompt sense .* BabyLM"), open_grader(config):
        pass


def test_the_named_ways_of_asking_are_those_that_a_resumed_run_may_record():
    assert tuple(PROTOCOLS) == PROMPTS


def test_a_doctor_that_was_stopped_asks_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "machine", lambda: [])
    chance = answers(lambda asked: 1 / (2 + len(asked) % 5))
    with FaultServer(other=chance) as server:
        argv = ["--teacher-url", server.url, "--teacher-prompt", "event", "--calibrate"]
        argv += ["--per-kind", "2", "--replies", str(tmp_path / "replies.jsonl")]
        doctor.main(argv)
        table, asked = capsys.readouterr().out, len(server.others)
        doctor.main(argv)
        assert len(server.others) == asked + 1  # the probe's
    again = capsys.readouterr().out
    rows = [line for line in again.splitlines() if "shuffled" in line or "halves" in line]
    assert len(rows) == 5 and all(row in table for row in rows)
