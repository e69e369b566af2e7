"""scripts/gpu_day.py whole on the simulated device, which is in every process that the script
starts, and what it records if steps fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from libraries import device_library

HERE = Path(__file__).parent
SANITIZER = '#!/bin/sh\necho "$@" >> "$0.calls"\nshift 4\nexec "$@"\n'
SMI = "#!/bin/sh\necho 'simulated, 580.1, 1980 MHz, 2619 MHz, 1980 MHz, 71.2 W, 700 W, 33'\n"


@pytest.fixture
def gpu_day(tmp_path):
    """Runs the script with these arguments; returns what it has recorded, its exit code and its
    output. `sanitizer` is what compute-sanitizer does."""

    def run(*arguments: str, sanitizer: str = SANITIZER, **env: str):
        device_library()  # no process of the script compiles it
        for name, text in (("compute-sanitizer", sanitizer), ("nvidia-smi", SMI)):
            tool = tmp_path / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(text)
            tool.chmod(0o755)
        env = (
            os.environ
            | {
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(HERE / "everywhere"),
                "TINYSTORY_KERNELS": "ours",
                "OMP_NUM_THREADS": "1",
            }
            | env
        )
        out = tmp_path / "gpu-day.json"
        command = [sys.executable, ROOT / "scripts/gpu_day.py", "--out", out, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return json.loads(out.read_text()), done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_a_whole_day(gpu_day, tmp_path):
    tests = "sample and (same_bits or default_one)"
    record, code, output = gpu_day("--shapes", "tiny", "--tests", tests)
    steps = {step["name"]: step for step in record["steps"]}
    assert [step["outcome"] for step in steps.values()] == ["ok"] * len(steps), output
    assert code == 0
    parts = list(dict.fromkeys(step["part"] for step in record["steps"]))
    assert parts == ["doctor", "build", "launch", "speeds", "tests", "sanitizers"]
    assert len(record["commit"]) >= 40

    facts = {key: value for result in steps["doctor"]["results"] for key, value in result.items()}
    assert facts["gpu"] == "simulated" and facts["nvidia_smi"]["clocks.sm"] == "1980 MHz"
    assert {"torch", "cuda", "l2_bytes", "capability", "multiprocessors"} <= facts.keys()

    assert record["test_totals"]["launch"] == {"passed": 18}

    speeds = [step["results"] for step in record["steps"] if step["part"] == "speeds"]
    benches = [result for results in speeds for result in results if "bench" in result]
    assert [bench["bench"] for bench in benches] == ["kernels", "rollout", "ppo", "pretrain"]
    rows = benches[0]["kernels"]
    assert {"attention_256", "attention_1024", "add_layer_norm", "lowered_linear_gelu"} <= set(rows)
    assert {"launch_us", "kernel_us", "node_us_of_49", "node_us_of_105"} == set(rows["host"])

    assert record["test_totals"]["tests"] == record["test_totals"]["memcheck"] == {"passed": 2}
    assert record["test_totals"]["racecheck"] == {"passed": 1}
    calls = (tmp_path / "bin/compute-sanitizer.calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck", "synccheck"]


def test_a_step_that_fails_is_recorded_and_does_not_stop_the_next(gpu_day):
    fails = "#!/bin/sh\necho '{\"found\": 1}'; echo broken; exit 3\n"
    record, code, _ = gpu_day("--parts", "sanitizers", sanitizer=fails)
    assert code == 3
    assert [step["name"] for step in record["steps"]] == ["memcheck", "racecheck", "synccheck"]
    for step in record["steps"]:
        assert step["outcome"] == "exit status 3"
        assert step["output"] == ["broken"] and step["results"] == [{"found": 1}]


def test_a_step_that_hangs_ends_with_all_that_it_has_started(gpu_day):
    hangs = "#!/bin/sh\nsleep 100000 &\nwait\n"  # the pipe stays open as long as anything lives
    record, _, _ = gpu_day("--parts", "sanitizers", "--minutes", "0.05", sanitizer=hangs)
    outcomes = [step["outcome"] for step in record["steps"]]
    assert outcomes == ["time limit", "no time left", "no time left"]


def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "gpu-day.json"
    command = [sys.executable, ROOT / "scripts/gpu_day.py", "--parts", "doctor", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    (recorded,) = json.loads(out.read_text())["steps"]
    assert done.returncode == 1 and recorded["outcome"] != "ok"
    assert any("CUDA" in line or "NVIDIA" in line for line in recorded["output"])
