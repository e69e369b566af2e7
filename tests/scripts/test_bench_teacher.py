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
    assert r["ratio"] == pytest.approx(r["ours_per_s"] / r["bare_per_s"], abs=0.01)
    assert min(r["ours_cpu_ms"], r["bare_cpu_ms"]) > 0


def test_a_server_is_measured_with_stories_that_it_has_not_seen(bench):
    with FaultServer(lambda story, n: counted("2 1 3", 600)) as server:
        r = bench("--teacher-url", server.url, "--stories", "3", "--runs", "1", "--concurrency", "2")
    assert (r["stories"], r["concurrency"]) == (3, 2) and r["one_per_s"] > 0 and r["latency_s"] > 0
    stories = {request["messages"][-1]["content"] for request in server.requests}
    assert len(stories) == 2 * 2 * 3 + 1  # two runs of each client, and the story of both probes
