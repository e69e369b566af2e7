"""What `make gpu-check` makes of commands that pass, fail, are missing or take too long."""

import json
import sys

import pytest
import torch
from conftest import fails

from scripts import bench, gpu_check
from scripts.gpu_check import commands, outcome, run_all
from tinystory.run.paths import ROOT

ROW = dict(ours_ms=1.0, torch_ms=1.5, ratio=1.5, tflop_s=300.0, limit_tflop_s=600.0)


def says(*lines, rc=0, seconds=0):
    program = f"import sys, time; print({chr(10).join(lines)!r}, flush=True); time.sleep({seconds}); sys.exit({rc})"
    return [sys.executable, "-c", program]


def test_each_command_is_run_and_told():
    kernels = dict(bench="kernels", shape="small", batch=32, kernels=dict(attention=ROW))
    rollout = dict(bench="rollout", shape="gpt2s", batch=360, tokens_per_s=50.0, rollout_s=2.0)
    results = run_all(
        {
            "tests": says("== 12 passed in 3 s =="),
            "memcheck": says("ERROR SUMMARY: 2 errors", rc=1),
            "racecheck": ["no-such-program"],
            "kernels": says(json.dumps(kernels)),
            "rollout": says("warming up", json.dumps(rollout | dict(gemm_limit_tokens_per_s=100.0))),
        },
        seconds=100.0,
    )
    assert [found["rc"] for found in results.values()] == [0, 1, None, 0, 0]
    assert results["kernels"]["rows"] == [kernels]
    outcomes = [outcome(result).split(",")[0] for result in results.values()]
    assert outcomes == ["passed", "failed (1)", "there is no no-such-program", "passed", "passed"]


def test_when_the_time_is_over_the_rest_is_not_run():
    results = run_all({"slow": says("begun", seconds=600), "next": says("never")}, seconds=2.0)
    assert results["slow"]["why"] == "stopped when the time was over" and results["slow"]["rc"] is None
    assert "begun" in results["slow"]["output"]
    assert results["next"]["why"] == "no time was left" and not results["next"]["output"]


def test_its_commands_exist():
    tests = (ROOT / "tests" / "ops" / "test_gpu.py").read_text()
    for name, argv in commands().items():
        if "scripts/bench.py" in argv:
            with pytest.raises(SystemExit) as exit:
                bench.main([*argv[2:], "--help"])
            assert exit.value.code == 0
        elif "-k" in argv:
            chosen = [word for word in argv[-1].split() if word not in ("not", "and")]
            assert all(word in tests for word in chosen), name


def test_without_a_gpu_it_says_so(capsys):
    if not torch.cuda.is_available():
        assert "there is no GPU" in fails(gpu_check.main, [], capsys)
