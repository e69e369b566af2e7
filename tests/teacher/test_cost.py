"""The cost of grading, and the budget that no request exceeds."""

import dataclasses
import random
from collections import Counter

import pytest
from fault_server import FaultServer, assert_one_clean_sentence, counted, graded

from tinystory.run.errors import UserError
from tinystory.teacher import client
from tinystory.teacher.client import Teacher
from tinystory.teacher.named_protocols import load_protocol

pytestmark = pytest.mark.usefixtures("short_pauses")


class Counting(FaultServer):
    def __init__(self, script=lambda story, n: counted("2 1 3"), **more):
        super().__init__(script, other=lambda asked: counted("A fox.", 20, 3), **more)

    def first(self):
        return counted("2 1 3")


def test_stats_and_cost_are_what_the_server_counted(tmp_path):
    stories = [f"Dog {i} ran." for i in range(10)]
    prices = dict(price_in=2.0, price_out=8.0, cache=tmp_path / "replies.jsonl")

    def script(story, n):
        return "500" if story == stories[3] and n == 0 else counted("2 1 3")

    with Counting(script) as server, Teacher([server.url], **prices) as teacher:
        teacher.ledger.stats()
        assert all(grade.scores for grade in graded(teacher, "Once", stories + stories[:2]))
        stats = teacher.ledger.stats()
        sent = len(server.requests) - 1
        assert stats["requests"] == sent
        assert stats["retries"] == 1
        assert stats["cached"] == 12 + 1 - sent
        assert (stats["tokens_in"], stats["tokens_out"]) == (500 * (sent - 1), 6 * (sent - 1))
        spent = teacher.ledger.cost
        assert teacher.ledger.stats() == {
            **dict.fromkeys(("requests", "retries", "cached", "tokens_in", "tokens_out"), 0),
            "cost": spent,
        }
    # earlier costs still count
    with Counting() as server, Teacher([server.url], **prices) as teacher:
        kept = 10 * (500 * 2 + 6 * 8) / 1e6
        assert kept <= teacher.ledger.price(*teacher.cache.charged[:2]) <= spent


def test_a_forecast_is_the_probe_times_the_stories():
    with (
        Counting() as server,
        Teacher([server.url], concurrency=4, price_in=1.0, price_out=2.0) as teacher,
    ):
        for seconds, words in (
            (0.01, "at most 1 min of grading"),
            (0.3, "at most 40 min of grading"),
        ):
            teacher.probes[0] = dataclasses.replace(teacher.probes[0], seconds=seconds)
            assert teacher.forecast(8000, "Once").endswith(words)
        teacher.probes[0] = dataclasses.replace(teacher.probes[0], seconds=3.6)
        forecasts = [teacher.forecast(8000, opening) for opening in ("Once", "Once " * 50)]
        assert len(server.requests) == 1  # the probe's
        longer = client.STORY_WORDS - len(" ".join(client.FIRST_STORY).split())
        for forecast, words in zip(forecasts, (1, 50), strict=True):
            tokens_in = 8000 * (500 + (longer + words) * client.TOKENS_PER_WORD)
            assert forecast == (
                f"8,000 stories, {tokens_in:,.0f} prompt tokens and 48,000 reply tokens, {24_000 + words:,} words for "
                f"the student, cost {(tokens_in + 2 * 48_000) / 1e6:.2f}, at most 8.0 hours of grading"
            )


def test_a_forecast_counts_the_replies_that_a_prompt_draws_once():
    """The probe counts the tokens of all eight replies to a prompt."""
    protocol = load_protocol("event")
    with Counting() as server, Teacher([server.url], protocol=protocol) as teacher:
        teacher.probes[0] = dataclasses.replace(teacher.probes[0], choices=True, tokens=[500, 48])
        assert teacher.draws == 8 and teacher.requests_per_story == 8
        assert "and 48,000 reply tokens" in teacher.forecast(1000, "Once")


@pytest.mark.parametrize("counts", [True, False])
def test_a_budget_is_never_exceeded_whatever_goes_wrong(counts):
    """The server's own count of what it bills stays within the budget, and comes close to it."""
    stories = [f"Dog {i} ran." for i in range(400)]
    dice = random.Random(3)
    billed = Counter()

    def script(story, n):
        what = dice.choice(["2 1 3"] * 6 + ["500", "reset", "malformed"])
        # with these faults the answer was generated and billed, but arrived damaged
        if what != "500":
            billed.update(tokens_in=500, tokens_out=6)
        return counted("2 1 3") if what == "2 1 3" and counts else what

    def bill():
        return (billed["tokens_in"] * 1.0 + billed["tokens_out"] * 3.0) / 1e6

    with (
        Counting(script) as server,
        Teacher([server.url], price_in=1.0, price_out=3.0, budget_cost=0.06) as teacher,
    ):
        billed.update(
            tokens_in=teacher.ledger.total["tokens_in"],
            tokens_out=teacher.ledger.total["tokens_out"],
        )
        graded(teacher, "Once", stories[:1])
        assert teacher.affords(1) and not teacher.affords(400)
        with pytest.raises(UserError) as caught:
            graded(teacher, "Once", stories)
        assert_one_clean_sentence(caught, "--budget-cost 0.06", "--resume")
        assert bill() <= teacher.ledger.cost <= 0.06 and not teacher.affords(1)
        in_flight = 16 * teacher.ledger.price(teacher.ledger.largest_in, 16)
        assert teacher.ledger.cost > 0.06 - in_flight
