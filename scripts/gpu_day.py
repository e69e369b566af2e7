"""Run everything that needs a GPU, the most informative parts first: doctor, build, one launch of
each kernel, speeds, tests, sanitizers. Each result is written at once to one JSON file.

    python scripts/gpu_day.py                             all parts, about half an hour
    python scripts/gpu_day.py --minutes 10                what fits in ten minutes
    python scripts/gpu_day.py --parts doctor build launch

In a clone, by any Python that has PyTorch for CUDA and the packages of pyproject.toml; without make,
network or .venv. Each step is a process with a time limit. A step that fails, hangs or runs out of
time does not stop the next one."""

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 40  # lines of output that are kept of each step
PARTS = ("doctor", "build", "launch", "speeds", "tests", "sanitizers")
# Arguments of lab/bench.py, by shape. tiny: only to try this script.
BATCHES = (
    "kernels --batch 32 --runs 20",
    "rollout --batch 360",
    "ppo --batch 64",
    "pretrain --batch 32",
)
FEW = "kernels --batch 2 --runs 1", "rollout --batch 8", "ppo --batch 4", "pretrain --batch 2"
BENCHES = {"small": BATCHES, "gpt2s": BATCHES, "tiny": [f"{bench} --new 8" for bench in FEW]}
# Tests under each sanitizer, which makes a kernel tens of times slower.
SANITIZED = {
    "memcheck": "not device_sees and not interaction",
    "racecheck": "same_bits",
    "synccheck": "same_bits",
}
CLOCKS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
)


@dataclass(frozen=True)
class Step:
    """A process. It prints results as JSON objects, one a line, among other lines."""

    part: str
    name: str
    limit_s: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """The number of steps that did not end well; 0 if all did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    add("--minutes", type=float, default=60, help="time limit of all parts together (default: 60)")
    add("--out", type=Path, default=ROOT / "build/gpu-day.json", metavar="FILE", help="the results")
    add("--shapes", nargs="+", choices=BENCHES, default=["small", "gpt2s"], help="of the speeds")
    add("--tests", default="", metavar="EXPRESSION", help="only these tests, as pytest's -k")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)  # a step's own process
    add("--argument", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        sys.path.insert(0, str(ROOT))
        from tinystory.run.errors import command

        return command(STEPS[args.step])(args.argument) or 0

    record: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit()}
    record["steps"] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for step in steps(args):
        left = 60 * args.minutes - (time.monotonic() - began)
        run_step(step, left, record, lambda: save(record, args.out))
    for line in summary(record):
        print(line)
    print(f"all results: {args.out}")
    return sum(step["outcome"] != "ok" for step in record["steps"])


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """The steps of the chosen parts, in order."""
    for part in PARTS:
        if part in args.parts:
            yield from steps_of(part, args)


def steps_of(part: str, args: argparse.Namespace) -> Iterator[Step]:
    if part == "doctor":
        yield Step(part, "doctor", 120, own("doctor"))
    elif part == "build":
        yield Step(part, "build", 600, own("build"))
    elif part == "launch":
        yield Step(part, "launch", 120, own("tests", "launch_of_each_kernel"))
    elif part == "speeds":
        yield Step(part, "clocks before", 30, own("clocks"))
        for shape in args.shapes:
            for bench in BENCHES[shape]:
                command = [*python("lab/bench.py"), *bench.split(), "--shape", shape]
                yield Step(part, f"{bench} {shape}", 180, [*command, "--device", "cuda"])
        yield Step(part, "clocks after", 30, own("clocks"))
    elif part == "tests":
        yield Step(part, "build for the tests", 900, own("build_all"))
        yield Step(part, "tests", 600, own("tests", args.tests))
    else:
        for tool, tests in SANITIZED.items():
            if args.tests:
                tests = f"({tests}) and ({args.tests})"
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
            few_shapes = {"TINYSTORY_TEST_SHAPES": "12"}
            yield Step(part, tool, 300, [*sanitizer, *own("tests", tests)], few_shapes)


def python(script: str) -> list[str]:
    return [sys.executable, "-u", str(ROOT / script)]


def own(step: str, argument: str = "") -> list[str]:
    """The command that runs a function of STEPS in a process of its own."""
    return [*python("scripts/gpu_day.py"), "--step", step, "--argument", argument]


# --- running the steps ----------------------------------------------------------------------------
def run_step(step: Step, left_s: float, record: dict[str, Any], flush: Callable[[], None]) -> None:
    """Run a step, for at most `left_s` seconds, and record it. `flush` is called after each
    result."""
    limit_s = min(step.limit_s, left_s)
    entry: dict[str, Any] = {"part": step.part, "name": step.name, "limit_s": round(limit_s)}
    entry |= {"outcome": "running", "results": []}
    record["steps"].append(entry)
    print(f"--- {step.name} (at most {max(limit_s, 0):.0f} s)", flush=True)
    if limit_s <= 0:
        entry["outcome"] = "no time left"
    elif not shutil.which(step.command[0]):
        entry["outcome"] = f"{step.command[0]} is missing"
    flush()
    if entry["outcome"] != "running":
        return

    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths()])}
    environment |= step.environment
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=read_results, args=(process, entry["results"], tail, flush))
    reader.start()
    try:
        code = process.wait(limit_s)
        entry["outcome"] = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        entry["outcome"] = "time limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the step has started
    reader.join()
    entry["seconds"] = round(time.monotonic() - began, 1)
    if entry["outcome"] != "ok":
        entry["output"] = list(tail)
    flush()


def paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def read_results(
    process: subprocess.Popen[str],
    results: list[dict[str, Any]],
    tail: deque[str],
    flush: Callable[[], None],
) -> None:
    """Print what a process prints, and keep its results and its last lines."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if isinstance(result, dict):
            results.append(result)
            flush()
        else:
            tail.append(line.rstrip("\n"))


def save(record: dict[str, Any], to: Path) -> None:
    """Replace the file of the results."""
    record["test_totals"] = {
        step["name"]: Counter(result["outcome"] for result in step["results"] if "test" in result)
        for step in record["steps"]
    }
    record["test_totals"] = {name: n for name, n in record["test_totals"].items() if n}
    new = to.with_name(f".{to.name}.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(to)


def summary(record: dict[str, Any]) -> Iterator[str]:
    for step in record["steps"]:
        totals = record["test_totals"].get(step["name"], {})
        counts = ", ".join(f"{n} {outcome}" for outcome, n in totals.items())
        yield f"{step.get('seconds', 0):6.1f} s  {step['name']:34} {step['outcome']}  {counts}"


def commit() -> str:
    """The commit of this clone, with "changed" if files differ from it; "unknown" without git."""
    try:
        head, status = (
            subprocess.run(["git", *words.split()], cwd=ROOT, capture_output=True, text=True)
            for words in ("rev-parse HEAD", "status --porcelain --untracked-files=no")
        )
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (", changed" if status.stdout else "")


# --- the steps' own processes ---------------------------------------------------------------------
def emit(**result: Any) -> None:
    print(json.dumps(result), file=sys.__stdout__, flush=True)


def doctor(_: str) -> None:
    """The state of the machine, and the properties of its GPU."""
    from scripts.doctor import machine

    emit(machine=platform.platform(), processors=os.cpu_count(), argv=sys.executable)
    for component, state in machine():
        emit(component=component, state=state)
    clocks("")
    import torch

    gpu = torch.cuda.get_device_properties(0)
    emit(
        gpu=gpu.name,
        capability=f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu.multi_processor_count,
        l2_bytes=gpu.L2_cache_size,
        memory_bytes=gpu.total_memory,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )


def clocks(_: str) -> None:
    """Driver, clocks, power and temperature, as nvidia-smi reports them."""
    if not shutil.which("nvidia-smi"):
        emit(nvidia_smi="missing")
        return
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        emit(nvidia_smi=dict(zip(CLOCKS.split(","), line.split(", "), strict=False)))


def build(_: str) -> None:
    """Compile the CPU's kernels, then the CUDA kernels that the presets use."""
    from tinystory.ops import build, cuda

    timed("the CPU's kernels", build.load)
    timed("CUDA kernels", cuda.load)
    for dtype in ("bfloat16", "float32"):
        load = functools.partial(cuda.load_attention, dtype, 64)
        timed(f"attention, {dtype}, head size 64", load)


def timed(name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    work()
    emit(built=name, seconds=round(time.monotonic() - began, 1))


def build_all(_: str) -> int:
    """Compile the attention kernels of the other dtypes and head sizes, in parallel."""
    from tinystory.ops import cuda

    load = "from tinystory.ops import cuda; cuda.load_attention({!r}, {})"
    processes = [
        subprocess.Popen([sys.executable, "-c", load.format(dtype, head_size)])
        for dtype in cuda.DTYPES
        for head_size in cuda.HEAD_SIZES
    ]
    return sum(process.wait() != 0 for process in processes)


def tests(expression: str) -> int:
    """Run the tests of the GPU; a result per test."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                error = {"error": str(report.longrepr)[-2000:]} if report.failed else {}
                seconds = round(report.duration, 2)
                print(file=sys.__stdout__)  # after pytest's dots
                emit(test=report.nodeid, outcome=report.outcome, seconds=seconds, **error)

    options = [
        "-q",
        "-m",
        "gpu",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_gpu.py",
    ]
    if expression:
        options += ["-k", expression]
    return int(pytest.main(options, plugins=[Reporter()]))


STEPS: dict[str, Callable[[str], int | None]] = {
    f.__name__: f for f in (doctor, clocks, build, build_all, tests)
}

if __name__ == "__main__":
    sys.exit(min(main(), 100))
