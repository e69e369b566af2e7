"""Plants bugs, one at a time, in a copy of the project, and shows what catches each.

    python tests/planted_bugs.py simt|ptx|host [--only WORD]

simt: in the CUDA kernels; their tests on the SIMT machine must catch it. ptx: in the inline PTX,
which the SIMT machine never sees; the probe must catch it, or else a kernel (needs what `make
ptx-check` builds in build/ptx, and nvcc). host: in the GPU's host path; a command on the simulated
device must fail, write other results, or wait or launch more often.

The bugs are in the planted_bugs.txt of each folder. Exits with 1 if a bug is missed, or if the text
that a bug replaces is not in the source exactly once; `--only` plants the bugs with the word in
their name."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIMT, PTX, DEVICE = (ROOT / "tests" / part for part in ("native/simt", "native/ptx", "cuda_device"))
LISTS = {"simt": SIMT, "ptx": PTX, "host": DEVICE}
COMPILER = os.environ.get("CXX", "c++")
SKIPPED = 77


@dataclass(frozen=True)
class Bug:
    """test: what shows the bug. harmless: nothing can show it. changes: file, text in it, text
    instead."""

    name: str
    test: str
    harmless: bool
    changes: list[tuple[str, str, str]]


def read_bugs(kind: str) -> list[Bug]:
    bugs = []
    text = (LISTS[kind] / "planted_bugs.txt").read_text()
    for block in re.split(r"\n\n+", text.strip())[1:]:  # the first says what the file is
        name, test, *lines = block.splitlines()
        changes: list[tuple[str, list[str], list[str]]] = []
        for line in lines:
            if line.startswith("    "):
                changes[-1][1 if line[4] == "-" else 2].append(line[5:])
            else:
                changes.append((line.strip(), [], []))
        texts = [(file, "\n".join(old), "\n".join(new)) for file, old, new in changes]
        harmless = test.endswith(" (harmless)")
        bugs.append(Bug(name, test.strip().removesuffix(" (harmless)"), harmless, texts))
    return bugs


def misfits(bug: Bug) -> list[tuple[str, str]]:
    """The changes, file and text, with a text that is not in the source exactly once."""
    return [
        (file, old) for file, old, _ in bug.changes if (ROOT / file).read_text().count(old) != 1
    ]


def planted_copy(bug: Bug | None, to: Path, *parts: str) -> Path:
    """`to`, with a copy of these parts of the project in which the bug is planted."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "runs")
    for part in parts:
        shutil.copytree(ROOT / part, to / part, ignore=ignored, dirs_exist_ok=True)
    for file, old, new in bug.changes if bug else ():
        path = to / file
        path.write_text(path.read_text().replace(old, new))
    return to


def included(source: Path) -> set[str]:
    """The names of a CUDA source and of all headers in its folder that it includes, also those that
    headers include."""
    names = {source.name}
    for name in re.findall(r'^#include "(\w+\.cuh)"', source.read_text(), re.MULTILINE):
        names |= included(source.with_name(name))
    return names


def first_failure(binary: Path, *arguments: str, cpu_s: int = 600) -> str:
    """The first failed check of a native test; "" if it passes."""
    # A bug may never end. CPU time, not the clock, limits it: a busy machine must not fail the
    # test.
    command = ["sh", "-c", f'ulimit -S -t {cpu_s}; exec "$@"', "sh", str(binary), *arguments]
    env = os.environ | {"SIMT_STOP_AT_FIRST": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode == 0:
        return ""
    failed = re.findall("^FAILED (.*)", ran.stdout, re.MULTILINE)
    return failed[0] if failed else f"the test ended with status {ran.returncode}"


# The kernels and sources of each test; an operator is a part of ops.
KERNELS = {
    "attention": ["attention_forward.cu", "attention_backward.cu"],
    "ops": ["attention_decode.cu", "gelu.cu", "layer_norm.cu", "sampling.cu", "token_logprob.cu"],
}
KERNELS["races"] = KERNELS["attention"] + KERNELS["ops"]
TESTS = {
    "attention": ["simt.cpp", "trace.cpp", "test_attention.cpp"],
    "ops": ["simt.cpp", "trace.cpp", "test_ops.cpp", "../../../csrc/cpu/sampling.cpp"],
    "races": ["simt.cpp", "trace.cpp", "tsan_hooks.cpp", "test_trace.cpp"],
}


class SimtTests:
    """The tests of the CUDA kernels on the SIMT machine. A bug's test is attention, races, or an
    operator of test_ops."""

    at_once = os.cpu_count()
    FLAGS = ("-std=c++20", "-march=native", "-ffp-contract=off", "-w", "-I", str(SIMT))
    # As CMakeLists.txt compiles and links simt_trace.
    TRACED = ("-O1", "-g1", "-fno-pie", "-fno-store-merging", "-fsanitize=thread")

    def __init__(self, work: Path, bugs: list[Bug]):
        self.work = work
        self.objects: dict[tuple[bool, str], Path] = {}
        tests = sorted({bug.test for bug in bugs})
        sources: set[tuple[bool, Path]] = set()
        for group in map(self.group, tests):
            traced = group == "races"
            sources |= {(traced, ROOT / "csrc/cuda" / name) for name in KERNELS[group]}
            sources |= {(traced and name == "test_trace.cpp", SIMT / name) for name in TESTS[group]}
        with ThreadPoolExecutor(self.at_once) as pool:
            built = pool.map(lambda source: self.built(source[1], work, source[0], "-O2"), sources)
            for (traced, source), made in zip(sources, built, strict=True):
                self.objects[traced, source.name] = made
            unsound = [
                what for what in pool.map(lambda test: self.failure(None, test), tests) if what
            ]
        if unsound:
            raise SystemExit(f"planted_bugs: the tests fail without a bug: {unsound}")

    def group(self, test: str) -> str:
        return test if test in KERNELS else "ops"

    def built(self, source: Path, folder: Path, traced: bool, optimized: str) -> Path:
        to = folder / f"{'traced_' * traced}{source.name}.o"
        flags = [*self.TRACED, f'-DBUDGETS="{SIMT}/budgets.txt"'] if traced else [optimized]
        command = [COMPILER, *self.FLAGS, *flags, "-x", "c++", "-c", source, "-o", to]
        subprocess.run([str(word) for word in command], check=True)
        return to

    def failure(self, bug: Bug | None, test: str) -> str:
        root = planted_copy(bug, Path(tempfile.mkdtemp(dir=self.work)), "csrc")
        group = self.group(test)
        traced = group == "races"
        changed = {Path(file).name for file, _, _ in bug.changes} if bug else set()
        linked = []
        for name in TESTS[group]:
            text = (SIMT / name).read_text()
            if any(f'csrc/cuda/{file}"' in text for file in changed):
                planted_copy(None, root, "tests/native/simt")
                linked.append(self.built(root / "tests/native/simt" / name, root, traced, "-O0"))
            else:
                linked.append(self.objects[traced and name == "test_trace.cpp", Path(name).name])
        for name in KERNELS[group]:
            source = root / "csrc/cuda" / name
            if changed & included(source):
                # A failing test is short, so optimizing it does not pay.
                linked.append(self.built(source, root, traced, "-O0"))
            else:
                linked.append(self.objects[traced, name])
        flags = ["-no-pie"] if traced else []
        subprocess.run([COMPILER, *flags, *linked, "-o", root / "test"], check=True)
        return first_failure(root / "test", *([] if test == "attention" else [test]))

    def caught(self, bug: Bug) -> str:
        return self.failure(bug, bug.test)


PTX_ARGUMENTS = {
    "attention_forward": "bf16",
    "attention_backward": "bf16",
    "attention_decode": "decode",
    "sampling": "sample",
    "token_logprob": "logprob",
    "gelu": "gelu",
    "layer_norm": "norm",
}


class PtxTests:
    """The probe of the primitives' PTX, then a kernel: a bug's test."""

    at_once = 1
    FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_80,code=compute_80", "--no-compress")
    BUILD = ROOT / "build/ptx"

    def __init__(self, work: Path, bugs: list[Bug]):
        places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        self.work, self.nvcc = work, shutil.which("nvcc", path=places)
        if self.nvcc is None:
            print("planted_bugs is SKIPPED: no nvcc, so no bugs are planted in the primitives' PTX")
            raise SystemExit(SKIPPED)

    def failure(self, source: Path, test: str, *arguments: str) -> str:
        """The failures when `test` runs with the PTX of `source` instead of the original PTX."""
        built = source.with_name(f"{source.stem}.ptx.o")
        command = [self.nvcc, *self.FLAGS, "-DPROBE=probe_ptx", "-c", source, "-o", built]
        compiled = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if compiled.returncode:
            return "does not compile: " + compiled.stderr.splitlines()[0]
        others = [] if test == "ptx_probe" else sorted(self.BUILD.glob("*.ptx.o"))
        others = [path for path in others if path.name not in (built.name, "probe.ptx.o")]
        libraries = [self.BUILD / f"lib{test}_host.a", self.BUILD / "libptx.a"]
        binary = source.with_name(test)
        subprocess.run([COMPILER, built, *others, *libraries, "-o", binary], check=True)
        failed = first_failure(binary, *arguments, cpu_s=6000)
        return re.sub(r"^.*Params\): |, of \w+ and .*", "", failed)[:100]

    def caught(self, bug: Bug) -> str:
        root = planted_copy(bug, Path(tempfile.mkdtemp(dir=self.work)), "csrc", "tests/native/ptx")
        if what := self.failure(root / "tests/native/ptx/probe.cu", "ptx_probe"):
            return f"probe: {what}"
        test = "ptx_attention" if bug.test.endswith("ward") else "ptx_ops"
        kernel = root / "csrc/cuda" / f"{bug.test}.cu"
        what = self.failure(kernel, test, PTX_ARGUMENTS[bug.test])
        return f"kernel: {what}" if what else ""


SHAPE = "--n-layer 2 --n-head 2 --n-embd 64 --context 64 --vocab-size 300 --batch-size 4 --micro-batch-size 2"
PRETRAIN = f"train_pretrain.py --corpus corpus.txt {SHAPE} --eval-every 3 --words 800 --dropout 0.1"
INTERACT = "train_interact.py --init init --reward reward.py:score --openings openings.txt --steps 2 --eval-stories 4"
INTERACT += " --eval-every 1 --stories-per-step 100 --max-new-tokens 24 --no-calibrate"
COMMANDS = {
    "pretrain": f"{PRETRAIN} --dtype float32",
    "pretrain16": f"{PRETRAIN} --dtype bfloat16",
    "one head": f"{PRETRAIN} --dtype float32 --n-embd 96 --n-head 1 --words 200",
    # the last of the chunks that share a GEMM is alone
    "pretrain with the CUDA kernels": f"{PRETRAIN} --dtype bfloat16 --words 200 --context 61",
    "interact": f"{INTERACT} --dtype float32",
    "interact16": f"{INTERACT} --dtype bfloat16",
}


@dataclass
class Outcome:
    """The outcome of a command: exit code and last error, stories and losses, and the costs on the
    device."""

    code: int
    error: str
    results: list
    costs: dict[str, int] = field(default_factory=dict)


class HostCommands:
    """The commands on the simulated device; a bug's test is one of them."""

    at_once = 1

    def __init__(self, work: Path, bugs: list[Bug]):
        self.work, self.clean = work, {}
        self.prepare()
        for command in dict.fromkeys(bug.test for bug in bugs):
            self.clean[command] = self.outcome(ROOT, command, "cuda")
            results = self.clean[command].results
            if command in ("pretrain", "interact"):
                here = self.outcome(ROOT, command, "cpu").results  # rounding may turn a draw
                assert here and differing(here, results) <= 0.1 * len(here), command
            assert self.evidence(None, command) == [], command
            print(f"{command}: exit {self.clean[command].code}, {len(results)} results", flush=True)

    def prepare(self) -> None:
        """A folder with a corpus, openings, a reward and a student that ends stories soon."""
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        from conftest import save_eager, tiny_stories

        import train_pretrain

        work = self.work
        (work / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
        (work / "openings.txt").write_text(
            "Once upon a time,\nMia said\nThen Tom had a boat\nOnce\n"
        )
        (work / "reward.py").write_text(
            "def score(opening, stories):\n    return [min(1.0, len(set(s.split())) / 12) for s in stories]\n"
        )
        out = ["--out", str(work / "p"), "--dtype", "float32", "--device", "cpu", "--words", "2500"]
        train_pretrain.main(["--corpus", str(work / "corpus.txt"), *SHAPE.split(), *out])
        save_eager(work / "p", work / "init")

    def outcome(self, root: Path, command: str, device: str) -> Outcome:
        work, counts = self.work, self.work / "counts.json"
        shutil.rmtree(work / "out", ignore_errors=True)
        counts.unlink(missing_ok=True)
        script, *options = COMMANDS[command].split()
        start = [root / script] if device == "cpu" else [root / "tests/cuda_device/run.py", script]
        env = os.environ | {
            "PYTHONPATH": str(root),
            "CUDA_DEVICE_COUNTS": str(counts),
            "TINYSTORY_KERNELS": "ours",
        }
        if command.endswith("with the CUDA kernels"):
            libraries = [sys.executable, root / "tests/cuda_device/libraries.py"]
            env["CUDA_DEVICE_KERNELS"] = subprocess.check_output(libraries, text=True).strip()
        line = [sys.executable, *map(str, start), *options, "--device", device, "--out", "out"]
        done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=work)
        results = []
        for name, key in (
            ("metrics.jsonl", "loss"),
            ("stories.jsonl", "story"),
            ("evaluations.jsonl", "story"),
        ):
            if (file := work / "out" / name).exists():
                records = map(json.loads, file.read_text().splitlines())
                results += [record.get(key) for record in records]
        errors = re.findall(r"^\S*(?:Error|Problem|error)\b.*", done.stderr, re.MULTILINE)
        counted = json.loads(counts.read_text()) if counts.exists() else {}
        costs = {name: counted.get(name, 0) for name in ("captures", "pools", "reserved")}
        costs["launches"] = sum(counted.get("launches", {}).values())
        for kind, where, n in counted.get("waits", ()):
            key = f"{kind} in {re.sub(r':[0-9]+', '', where)}"
            costs[key] = costs.get(key, 0) + n
        return Outcome(done.returncode, (errors or [""])[-1], results, costs)

    def evidence(self, bug: Bug | None, command: str) -> list[str]:
        shutil.rmtree(self.work / "planted", ignore_errors=True)
        root = planted_copy(bug, self.work / "planted", ".")
        clean, planted = self.clean[command], self.outcome(root, command, "cuda")
        if planted.code != clean.code:
            return [f"exit {planted.code}: {planted.error[:150]}"]
        signs = []
        if count := differing(clean.results, planted.results):
            signs.append(f"{count} of {len(clean.results)} results differ")
        for key, n in planted.costs.items():
            was = clean.costs.get(key, 0)
            # the planted text may launch something itself
            if n > was * (1.02 if key == "launches" else 1):
                signs.append(f"{key}: {n} instead of {was}")
        return signs

    def caught(self, bug: Bug) -> str:
        return "; ".join(self.evidence(bug, bug.test))[:220]


def differing(a: list, b: list) -> int:
    """The number of different results; losses count as the same within 1e-4."""
    pairs = zip(a, b, strict=False)
    near = (
        abs(x - y) < 1e-4 if isinstance(x, float) and isinstance(y, float) else x == y
        for x, y in pairs
    )
    return sum(not same for same in near) + abs(len(a) - len(b))


HARNESSES = {"simt": SimtTests, "ptx": PtxTests, "host": HostCommands}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=HARNESSES)
    parser.add_argument("--only", default="", metavar="WORD")
    args = parser.parse_args()
    bugs = [bug for bug in read_bugs(args.kind) if args.only in bug.name]
    if gone := [misfit for bug in bugs for misfit in misfits(bug)]:
        raise SystemExit(f"planted_bugs: not in the source exactly once: {gone}")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        harness = HARNESSES[args.kind](Path(folder), bugs)
        with ThreadPoolExecutor(harness.at_once) as pool:
            for bug, what in zip(bugs, pool.map(harness.caught, bugs), strict=True):
                missed += not (what or bug.harmless)
                verdict = what or ("harmless" if bug.harmless else "NOT CAUGHT")
                print(f"{bug.name:60} {verdict}", flush=True)
    print(f"planted bugs: {len(bugs) - missed} passed, {missed} failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
