"""Everything to be known about the CUDA kernels on this machine's GPU, in under nine minutes: `make gpu-check`.

    python scripts/gpu_check.py --out build/gpu-check

The GPU tests, the same under compute-sanitizer, and speeds: kernels beside PyTorch's (every backend of its attention),
pretraining beside its matmuls alone, rollout and PPO. OUT.json has every command with its output, OUT.md a table under
the card's name. A command that fails does not stop the next; one for which no time is left is listed as not run.
Exits with 1 unless every test and sanitizer passed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write
from tinystory.run.paths import ROOT

MINUTES = 9.0
TESTS = ("-m", "pytest", "-q", "-m", "gpu")
SMALL = {"TINYSTORY_TEST_SHAPES": "12"}  # a sanitizer makes a kernel tens of times slower
# name: (command after python, or after compute-sanitizer and python; environment). The most telling come first.
CHECKS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "tests": (TESTS, {}),
    "memcheck": ((*TESTS, "-k", "not device_sees and not interaction"), SMALL),
    "racecheck": ((*TESTS, "-k", "same_bits"), SMALL),
    "synccheck": ((*TESTS, "-k", "same_bits"), SMALL),
} | {
    f"{bench} {shape}": (("scripts/bench.py", bench, "--shape", shape, "--device", "cuda", *more), {})
    for bench, *more in (
        ("kernels", "--batch", "32", "--runs", "20"), ("rollout", "--batch", "360"), ("ppo", "--batch", "64"),
        ("pretrain", "--batch", "32"),
    )
    for shape in ("small", "gpt2s")
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="OUT.json and OUT.md are written")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it (default: {MINUTES:g})")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU that this torch can use; scripts/doctor.py says what it sees")
    card = torch.cuda.get_device_properties(0)
    facts = dict(
        card=card.name, capability=f"{card.major}.{card.minor}", memory_gib=round(card.total_memory / 2**30, 1),
        torch=torch.__version__, cuda=torch.version.cuda,
    )  # fmt: skip
    commands = {name: (launcher(name) + list(rest), environment) for name, (rest, environment) in CHECKS.items()}
    results = run_all(commands, options.minutes * 60)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out.with_suffix(".json"), json.dumps(dict(facts, results=results), indent=1) + "\n")
    atomic_write(options.out.with_suffix(".md"), table(facts, results))
    print(f"\n{table(facts, results)}\n{options.out.with_suffix('.json')}, {options.out.with_suffix('.md')}")
    if any(results[name]["rc"] != 0 for name in ("tests", *SANITIZERS)):
        raise SystemExit(1)


def launcher(name: str) -> list[str]:
    """What a check's command begins with."""
    if name not in SANITIZERS:
        return [sys.executable]
    return ["compute-sanitizer", "--tool", name, "--error-exitcode", "1", sys.executable]


def run_all(commands: Mapping[str, tuple[Sequence[str], dict[str, str]]], seconds: float) -> dict[str, dict[str, Any]]:
    """Run each command within the seconds that are left for all, and show the end of its output. Per name: the
    command, rc (null: not run, or stopped for time), why if so, seconds, output, and `told`, its lines of JSON."""
    until, results = time.monotonic() + seconds, {}
    for name, (argv, environment) in commands.items():
        print(f"\n== {name}: {' '.join(argv)}", flush=True)
        began = time.monotonic()
        found: dict[str, Any] = dict(command=" ".join(argv), rc=None, why="", seconds=0.0, output="", told=[])
        results[name] = found
        if shutil.which(argv[0]) is None:
            found["why"] = f"there is no {argv[0]}"
        elif began >= until:
            found["why"] = "no time was left"
        else:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            try:
                found["output"], _ = process.communicate(timeout=until - began)
                found["rc"] = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                found["output"], _ = process.communicate()
                found["why"] = "stopped when the time was over"
            found["seconds"] = round(time.monotonic() - began, 1)
            found["told"] = [json.loads(line) for line in found["output"].splitlines() if is_json(line)]
        print(found["output"][-2000:] or found["why"], flush=True)
    return results


def is_json(line: str) -> bool:
    return line.startswith('{"') and line.endswith("}")  # not what a command that was stopped left of one


def table(facts: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Markdown: how each command ended, then the speeds."""
    about = f"{facts['card']} ({facts['capability']}, {facts['memory_gib']} GiB), torch {facts['torch']}"
    lines = [f"## {about}", "", "| check | outcome | seconds |", "|---|---|---|"]
    for name, found in results.items():
        ended = {0: "passed", None: found["why"]}.get(found["rc"], f"failed ({found['rc']})")
        said = [line for line in found["output"].splitlines() if " passed" in line or "ERROR SUMMARY" in line]
        lines.append(
            f"| {name} | {ended}{': ' * bool(said)}{said[-1].strip('= ') if said else ''} | {found['seconds']} |"
        )
    rates = [each for found in results.values() for each in found["told"]]
    lines += [
        "",
        "| kernel | shape | ours, ms | PyTorch's best, ms | ratio | reached of its limit |",
        "|---|---|---|---|---|---|",
    ]
    for each in rates:
        for kernel, row in each.get("kernels", {}).items():
            reached = [f"{row[u]} of {row['limit_' + u]} {u}" for u in ("tflop_s", "gb_s") if u in row]
            cells = (kernel, each["shape"], row["ours_ms"], row["torch_ms"], row["ratio"], *(reached or [""]))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| what | shape | tokens/s | of the matmuls alone | seconds |", "|---|---|---|---|---|"]
    for each in rates:
        if "kernels" not in each:
            rate, limit = each.get("tokens_per_s"), each.get("gemm_limit_tokens_per_s")
            seconds = next(each[key] for key in ("total_s", "step_s", "rollout_s") if key in each)
            share = f"{rate / limit:.2f}" if rate and limit else ""
            cells = (f"{each['bench']}, batch {each['batch']}", each["shape"], rate or "", share, seconds)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
