"""Each server of today is asked in the cheapest way that it allows: tests/todays_servers.py."""

import pytest
from fault_server import graded
from todays_servers import SERVERS, TodaysServer, most_logprobs

from tinystory.teacher.answers import YesNo
from tinystory.teacher.client import Teacher
from tinystory.teacher.named_protocols import PROTOCOLS

pytestmark = pytest.mark.usefixtures("short_pauses")

ANSWERS = 16
DRAWS = YesNo.draws
TEMPLATE = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
EXPECTED = {
    # name: (requests of the probe, requests and reply tokens of 16 answers, the probe's findings)
    "1 GPT-5.1 and later": (
        8,
        16,
        16,
        dict(top_logprobs=10, refused=[], quiet={"reasoning_effort": "none"}),
    ),
    "2 DeepSeek, Kimi, GLM, hosted": (
        9,
        16,
        16,
        dict(top_logprobs=10, quiet={"thinking": {"type": "disabled"}}),
    ),
    "2 DeepSeek, Kimi behind vLLM": (5, 16, 16, dict(top_logprobs=10, quiet=TEMPLATE)),
    "3 mlx_lm.server": (3, 16, 16, dict(top_logprobs=10)),
    "4 vLLM --max-logprobs 5": (4, 16, 16, dict(top_logprobs=5)),
    "4 top_logprobs in range [0, 5]": (4, 16, 16, dict(top_logprobs=5)),
    "5 a newline before the answer": (
        4,
        16,
        32,
        dict(top_logprobs=10, least_tokens=4, quiet={}),
    ),
    "6 LM Studio": (4, 16, 16, dict(top_logprobs=10, responses=True)),
    "7 wordy, obeys structured_outputs": (6, 16 * DRAWS, 16 * DRAWS, dict(held_to="grammar")),
    "7 wordy, obeys a JSON schema": (7, 16 * DRAWS, 16 * DRAWS * 5, dict(held_to="json")),
    "7 wordy, obeys nothing": (7, 16 * DRAWS, None, dict(held_to="nothing")),
    "8 n choices": (6, 16, 16 * DRAWS, dict(choices=True)),
    "8 refuses n": (7, 16 * DRAWS, 16 * DRAWS, dict(choices=False)),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_of_today_is_asked_in_its_cheapest_way(name):
    of_probe, requests, reply_tokens, findings = EXPECTED[name]
    stories = [f"A dog number {i} ran home." for i in range(ANSWERS)]
    with (
        TodaysServer(SERVERS[name]) as server,
        Teacher([server.url], protocol=PROTOCOLS["event"]) as teacher,
    ):
        (probe,) = teacher.probes
        found = {key: getattr(probe, key) for key in findings}
        assert (found, len(server.requests)) == (findings, of_probe)
        said = server.reply_tokens
        grades = graded(teacher, "Once upon a time,", stories)
        assert len(server.requests) == of_probe + requests
        assert reply_tokens in (server.reply_tokens - said, None)
    assert probe.scored and all(grade.score is not None for grade in grades)
    assert len({grade.score for grade in grades}) > 2


def test_a_first_word_that_counts_is_said(capsys):
    with (
        TodaysServer(SERVERS["7 wordy, obeys nothing"]) as server,
        Teacher([server.url], protocol=PROTOCOLS["event"]),
    ):
        assert "the first word counts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message", ["top_logprobs must be at most 5", "logprobs <= 5", "top_logprobs: between 0 and 5"]
)
def test_the_number_of_log_probabilities_is_read_in_a_refusal(message):
    with (
        TodaysServer(most_logprobs(message)) as server,
        Teacher([server.url], protocol=PROTOCOLS["event"]) as teacher,
    ):
        assert teacher.probes[0].top_logprobs == 5


def test_draws_that_are_missing_after_a_kill_are_asked_for_in_one_request(tmp_path):
    path = tmp_path / "replies.jsonl"
    with TodaysServer(SERVERS["8 n choices"]) as server:
        for _ in range(2):
            with Teacher([server.url], protocol=PROTOCOLS["event"], cache=path) as teacher:
                (grade,) = graded(teacher, "Once", ["A dog ran."])
                counts = teacher.ledger.total
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[: 1 + 3]))  # the probe and three of the draws
        assert [body.get("n", 1) for body in server.requests[-2:]] == [DRAWS, DRAWS - 3]
        assert all("seed" not in body for body in server.requests[-2:])
    assert grade.score is not None and counts["cached"] == 3
