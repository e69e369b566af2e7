"""scripts/bench_teacher.py on a few stories: one line of JSON that adds up."""

import json

import pytest
from fault_server import FaultServer, counted

from scripts import bench_teacher


@pytest.fixture
def bench(capsys):
    def run(*argv: str) -> dict:
        bench_teacher.main(list(argv))
        return json.loads(capsys.readouterr().out)

    return run


def test_our_client_beside_the_bare_one(bench):
    r = bench("--stories", "40", "--runs", "1", "--concurrency", "8")
    assert (r["stories"], r["runs"], r["concurrency"]) == (40, 1, 8)
    assert r["ratio"] == pytest.approx(r["ours_per_s"] / max(r["aiohttp_per_s"], r["httpx_per_s"]), abs=0.01)
    assert min(r["ours_cpu_ms"], r["aiohttp_cpu_ms"], r["httpx_cpu_ms"]) > 0


def test_slow_servers_beside_one_another(bench):
    """A server that works on 8 requests at a time gives no more than 40 replies per second."""
    r = bench("--latency", "0.2", "--stories", "24", "--runs", "1")
    assert r["latency_s"] == 0.2 and 0 < r["one_per_s"] <= 40 and 0 < r["three_per_s"] <= 120
    assert r["of_three"] == pytest.approx(r["three_per_s"] / r["one_per_s"] / 3, abs=0.01)


def test_a_server_is_asked_in_both_orders(bench):
    with FaultServer(lambda story, n: counted("2 1 3", 600), other=lambda asked: counted("A fox.", 400)) as server:
        r = bench("--teacher-url", server.url, "--stories", "2", "--runs", "1", "--concurrency", "2")
        swapped = [asked for asked in server.others if len(asked["messages"]) == 2]
    assert (r["model"], r["prompt_tokens"]) == ("first", 500) and r["rubric_first_s"] > 0 and r["rubric_last_s"] > 0
    assert r["concurrency"] == 2 and r["one_per_s"] > 0
    assert (
        len(server.requests) == 1 + 2 * (2 + 3) and len(swapped) == 2 * 3
    )  # two runs: two stories for the rate, then a first and two more
    assert all("from 0 to 3" in asked["messages"][1]["content"] for asked in swapped)
