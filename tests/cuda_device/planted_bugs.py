"""Plant the bugs of planted_bugs.txt, one at a time, in a copy of the project, run a command on the
simulated device, and say what gives each away, and after how many seconds. Exits with 1 if one is
missed.

python tests/cuda_device/planted_bugs.py [NUMBER ...]
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SHAPE = "--n-layer 2 --n-head 2 --n-embd 64 --context 64 --vocab-size 300 --batch-size 4 --micro-batch-size 2"
PRETRAIN = f"train_pretrain.py --corpus corpus.txt {SHAPE} --eval-every 3 --words 800 --dropout 0.1"
INTERACT = "train_interact.py --init init --reward reward.py:score --openings openings.txt --steps 2 --eval-stories 4"
INTERACT += " --eval-every 1 --stories-per-step 100 --max-new-tokens 24 --no-calibrate"
COMMANDS = {
    "pretrain": f"{PRETRAIN} --dtype float32",
    "pretrain16": f"{PRETRAIN} --dtype bfloat16",
    "one head": f"{PRETRAIN} --dtype float32 --n-embd 96 --n-head 1 --words 200",
    "interact": f"{INTERACT} --dtype float32",
    "interact16": f"{INTERACT} --dtype bfloat16",
}


@dataclass
class Bug:
    """changes: file, text in it, text instead."""

    name: str
    command: str
    changes: list[tuple[str, str, str]]


def read_bugs() -> list[Bug]:
    bugs = []
    for block in re.split(r"\n\n+", (HERE / "planted_bugs.txt").read_text().strip())[1:]:
        name, command, *lines = block.splitlines()
        changes: list[tuple[str, list[str], list[str]]] = []
        for line in lines:
            if line.startswith("    "):
                changes[-1][1 if line[4] == "-" else 2].append(line[5:])
            else:
                changes.append((line.strip(), [], []))
        bugs.append(
            Bug(
                name,
                command.strip(),
                [(file, "\n".join(a), "\n".join(b)) for file, a, b in changes],
            )
        )
    return bugs


@dataclass
class Outcome:
    """Of a command: its exit code and last error, the stories and losses, and what it cost on the
    device."""

    code: int
    error: str
    results: list
    costs: dict[str, int] = field(default_factory=dict)


def run(root: Path, command: str, work: Path, device: str) -> Outcome:
    shutil.rmtree(work / "out", ignore_errors=True)
    counts = work / "counts.json"
    counts.unlink(missing_ok=True)
    start = [] if device == "cpu" else [root / "tests/cuda_device/run.py"]
    script, *options = COMMANDS[command].split()
    script = script if start else str(root / script)
    env = os.environ | {
        "PYTHONPATH": str(root),
        "CUDA_DEVICE_COUNTS": str(counts),
        "TINYSTORY_KERNELS": "ours",
    }
    line = [sys.executable, *start, script, *options, "--device", device, "--out", "out"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, env=env, cwd=work)
    results = []
    for name, key in (
        ("metrics.jsonl", "loss"),
        ("stories.jsonl", "story"),
        ("evaluations.jsonl", "story"),
    ):
        if (file := work / "out" / name).exists():
            results += [
                record.get(key) for record in map(json.loads, file.read_text().splitlines())
            ]
    errors = [x for x in done.stderr.splitlines() if re.match(r"^\S*(Error|Problem|error)\b", x)]
    counted = json.loads(counts.read_text()) if counts.exists() else {}
    costs = {name: counted.get(name, 0) for name in ("captures", "pools", "reserved")}
    costs["launches"] = sum(counted.get("launches", {}).values())
    for kind, where, n in counted.get("waits", ()):
        key = f"{kind} in {re.sub(r':[0-9]+', '', where)}"
        costs[key] = costs.get(key, 0) + n
    return Outcome(done.returncode, (errors or [""])[-1], results, costs)


def differing(a: list, b: list) -> int:
    """How many results are not the same, losses within 1e-4."""
    pairs = zip(a, b, strict=False)
    near = (
        abs(x - y) < 1e-4 if isinstance(x, float) and isinstance(y, float) else x == y
        for x, y in pairs
    )
    return sum(not same for same in near) + abs(len(a) - len(b))


def evidence(clean: Outcome, planted: Outcome) -> list[str]:
    if planted.code != clean.code:
        return [f"exit {planted.code}: {planted.error[:150]}"]
    found = []
    if count := differing(clean.results, planted.results):
        found.append(f"{count} of {len(clean.results)} results differ")
    for key, n in planted.costs.items():
        was = clean.costs.get(key, 0)
        # the planted text may launch something itself
        if n > was * (1.02 if key == "launches" else 1):
            found.append(f"{key}: {n} instead of {was}")
    return found


def prepare(work: Path) -> None:
    """A corpus, openings, a reward and a student that ends its stories soon."""
    from conftest import save_eager, tiny_stories

    import train_pretrain

    (work / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
    (work / "openings.txt").write_text("Once upon a time,\nMia said\nThen Tom had a boat\nOnce\n")
    (work / "reward.py").write_text(
        "def score(opening, stories):\n    return [min(1.0, len(set(s.split())) / 12) for s in stories]\n"
    )
    out = ["--out", str(work / "p"), "--dtype", "float32", "--device", "cpu", "--words", "2500"]
    train_pretrain.main(["--corpus", str(work / "corpus.txt"), *SHAPE.split(), *out])
    save_eager(work / "p", work / "init")


def plant(changes: list[tuple[str, str, str]], copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "runs"))
    for file, old, new in changes:
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (copy / file).write_text(text.replace(old, new))


def main(numbers: list[str]) -> int:
    bugs = read_bugs()
    chosen = [bugs[int(n) - 1] for n in numbers] or bugs
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        clean = {}
        for command in dict.fromkeys(bug.command for bug in chosen):
            clean[command] = run(ROOT, command, work, "cuda")
            if command in ("pretrain", "interact"):
                here = run(ROOT, command, work, "cpu").results  # rounding may turn a draw
                assert here and differing(here, clean[command].results) <= 0.1 * len(here), command
            plant([], work / "planted")  # nothing, which must not be caught
            assert evidence(clean[command], run(work / "planted", command, work, "cuda")) == [], (
                command
            )
            print(
                f"{command}: exit {clean[command].code}, {len(clean[command].results)} results",
                flush=True,
            )
        for bug in chosen:
            start = time.monotonic()
            plant(bug.changes, work / "planted")
            why = evidence(clean[bug.command], run(work / "planted", bug.command, work, "cuda"))
            missed += not why
            verdict = f"{'caught' if why else 'MISSED'} in {time.monotonic() - start:.0f} s"
            print(f"{verdict}: {bug.name}: {'; '.join(why)[:220]}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
