"""Plants one bug at a time in the CUDA kernels and shows that the tests on the SIMT machine catch
it.

Prints a table: the bug, and the first failed check. Fails if a bug is not caught, or if the text
that it replaces is no longer in the source. `--only WORD` plants the bugs whose name contains the
word.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
FLAGS = ["-std=c++20", "-march=native", "-ffp-contract=off", "-w", "-I", str(HERE)]
KERNELS = {
    "attention": ["attention_forward.cu", "attention_backward.cu"],
    "ops": ["attention_decode.cu", "layer_norm.cu", "sampling.cu", "token_logprob.cu"],
}
KERNELS["races"] = KERNELS["attention"] + KERNELS["ops"]
TESTS = {
    "attention": ["simt.cpp", "trace.cpp", "test_attention.cpp"],
    "ops": ["simt.cpp", "trace.cpp", "test_ops.cpp", "sampling.cpp"],
    "races": ["simt.cpp", "trace.cpp", "tsan_hooks.cpp", "test_trace.cpp"],
}
# As CMakeLists.txt compiles and links simt_trace.
TRACED = [
    "-O1",
    "-g1",
    "-fno-pie",
    "-fno-store-merging",
    "-fsanitize=thread",
    f'-DBUDGETS="{HERE}/budgets.txt"',
]


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in csrc/cuda
    old: str
    new: str
    test: str = "attention"  # or "races", or an op of test_ops
    count: int = 1  # which occurrence of `old`


FORWARD, BACKWARD, DECODE = "attention_forward.cu", "attention_backward.cu", "attention_decode.cu"
TILES, ROWS, SAMPLING, LOGPROB = "tiles.cuh", "rows.cuh", "sampling.cu", "token_logprob.cu"
NORM, NORM_STORE = "layer_norm.cu", "store4(p.x.grad_x + at + 4 * g, x);"
POST = "if (threadIdx.x == 0 && tile > first_tile && block > 0)"
UNSWIZZLED = "first = shared_memory() + to.offset + row * Tile<Element, D>::kRowBytes + c * 16;"
BUGS = [
    # Barriers and asynchronous copies.
    Bug("forward: no barrier after the wait for a tile", FORWARD, "    sync_block();", "    "),
    Bug("forward: does not wait for the copies", FORWARD, "copy_wait<0>();", "copy_wait<1>();"),
    Bug(
        "forward: next tile overwrites the one in use",
        FORWARD,
        "keys(tile % 2), next",
        "keys(0), next",
    ),
    Bug(
        "forward: idle warps skip the barrier",
        FORWARD,
        "    copy_wait<0>();\n",
        "    if (k0 > first + 16 * kMmaM - 1) continue;\n    copy_wait<0>();\n",
    ),
    Bug("backward: no barrier after the wait for a tile", BACKWARD, "    sync_block();", "    "),
    Bug(
        "backward: dS is read before all is written", BACKWARD, "    sync_block();", "    ", count=2
    ),
    Bug(
        "backward: does not wait for its turn",
        BACKWARD,
        "wait_for(turn, before, seen)",
        "(void)seen",
        "races",
    ),
    Bug(
        "backward: a turn is passed on too early",
        BACKWARD,
        POST,
        f"post(turn, before + 1);\n    {POST}",
        "races",
    ),
    Bug("backward: turns are not passed on", BACKWARD, POST, f"if (false) {POST}"),
    Bug(
        "output: no sync_warp before rows are read back",
        TILES,
        "  sync_warp();\n  constexpr",
        "  constexpr",
    ),
    Bug(
        "rows: the next sum overwrites this one",
        ROWS,
        "  sync_block();\n  return x;",
        "  return x;",
        "logprob",
    ),
    Bug(
        "sampling: no barrier after clearing buckets",
        SAMPLING,
        "= 0;\n      sync_block();",
        "= 0;",
        "sample",
    ),
    Bug(
        "layer_norm: warps' sums read before all are there",
        NORM,
        "  sync_block();\n  for",
        "  for",
        "norm",
    ),
    # Masks, tails and bounds.
    Bug("forward: a query does not see its own key", FORWARD, "i % 2 > first", "i % 2 >= first"),
    Bug(
        "backward: a key is not seen by its own query", BACKWARD, "i % 2 < first", "i % 2 <= first"
    ),
    Bug("tiles: rows past the end are read", TILES, "row + r < valid);", "true);"),
    Bug(
        "output: the last row is not written",
        TILES,
        "if (row + r < valid)",
        "if (row + r + 1 < valid)",
    ),
    Bug("output: rows past the end are written", TILES, "if (row + r < valid)", "if (true)"),
    Bug(
        "decode: one key too many", DECODE, "+ group < end ? dot", "+ group <= end ? dot", "decode"
    ),
    Bug(
        "decode: appended a position too far",
        DECODE,
        "(2 * length + group)",
        "(2 * length + 2 + group)",
        "decode",
    ),
    Bug(
        "decode: more than the two appended",
        DECODE,
        "if (split == 0 && group < 2)",
        "if (group <= 2)",
        "decode",
    ),
    Bug(
        "decode: the cache is read P keys late",
        DECODE,
        "cache + 2 * (j - P)",
        "cache + 2 * j",
        "decode",
    ),
    Bug("decode: a length is not checked", DECODE, "length < p.T,", "length <= p.T,", "assertions"),
    Bug(
        "logits: the last gradient is not written",
        LOGPROB,
        "if (v + i < p.V)",
        "if (v + i + 1 < p.V)",
        "logprob",
    ),
    Bug(
        "logits: a row is read past its end",
        ROWS,
        "v + i < V ? to_float",
        "true ? to_float",
        "logprob",
    ),
    Bug("layer_norm: rows past the end are read", NORM, " && row < p.x.rows;", ";", "norm"),
    # Where things lie.
    Bug("tiles: rows four apart share banks", TILES, "row % 8 :", "row % 4 :"),
    Bug(
        "tiles: swizzled when read, not when written",
        TILES,
        "first = to.chunk(row, c);",
        UNSWIZZLED,
    ),
    Bug(
        "gemm: two registers of an operand swapped",
        TILES,
        "A[mi][ki + i / 2][i % 2]",
        "A[mi][ki + i % 2][i / 2]",
    ),
    Bug("gemm: values are not transposed", TILES, "ldmatrix_transposed(b,", "ldmatrix(b,"),
    Bug(
        "dropout: tile indices exchanged for keys", BACKWARD, "head, first, q0)", "head, q0, first)"
    ),
    Bug(
        "dropout: bits of neighbouring queries mixed up",
        TILES,
        "(kTransposed ? 2 * t + odd",
        "(kTransposed ? 2 * t",
    ),
    Bug(
        "tiles: addresses are not multiples of 16",
        TILES,
        "* kVecElements<Element>;",
        "* kVecElements<Element> + 1;",
    ),
    Bug(
        "layer_norm: Philox called once per row",
        NORM,
        "if (turn % 4 == 0) words",
        "if (turn == 0) words",
        "norm",
    ),
    # Arithmetic that only some inputs show.
    Bug(
        "softmax: output not rescaled with the maximum",
        FORWARD,
        "O[mi][ni][i] *= rescale",
        "O[mi][ni][i] *= 1",
    ),
    Bug(
        "softmax: the sum misses three of four lanes",
        FORWARD,
        "warp_sum<4>(l[mi][half])",
        "l[mi][half]",
    ),
    Bug(
        "decode: sums merged without their maxima",
        DECODE,
        "fmaf(part[D + 1], weight, l)",
        "l + part[D + 1]",
        "decode",
    ),
    Bug(
        "decode: a product misses half of the lanes",
        DECODE,
        "warp_sum<kLanes>",
        "warp_sum<kLanes / 2>",
        "decode",
    ),
    Bug(
        "sampling: all ties at the threshold count",
        SAMPLING,
        "(equal < free ? equal : free)",
        "equal",
        "sample",
    ),
    Bug(
        "entropy: not rescaled with the maximum",
        LOGPROB,
        "factor * fmaf(l,",
        "1 * fmaf(l,",
        "logprob",
    ),
    Bug(
        "layer_norm: variance around 0",
        NORM,
        "d = kept[i * groups + g] - mean",
        "d = kept[i * groups + g]",
        "norm",
    ),
    Bug(
        "layer_norm: the stream's gradient is dropped out",
        NORM,
        NORM_STORE,
        f"dropout.apply(x, g); {NORM_STORE}",
        "norm",
    ),
    # Races. Of the first two and decode's it is known that all results stay right on this machine;
    # of the others not.
    Bug(
        "sampling: histogram without an atomic",
        SAMPLING,
        "atomic_add_shared(&shared.histogram[key >> shift & digits], x)",
        "shared.histogram[key >> shift & digits] += x",
        "races",
    ),
    Bug(
        "output: rows staged before all lanes have read",
        TILES,
        "  sync_warp();\n  store_fragments",
        "  store_fragments",
        "races",
    ),
    Bug(
        "output: a shuffle in place of sync_warp",
        TILES,
        "  sync_warp();\n  constexpr",
        "  ballot(true);\n  constexpr",
        "races",
    ),
    Bug(
        "layer_norm: a warp's sums in the next one's place",
        NORM,
        "own_row() * 2 * C, *",
        "own_row() * C, *",
        "races",
    ),
    Bug(
        "decode: every split appends the key and value",
        DECODE,
        "if (split == 0 && group < 2)",
        "if (group < 2)",
        "races",
    ),
    Bug(
        "sampling: buckets cleared before all have searched",
        SAMPLING,
        "    sync_block();\n    return uint32_t(",
        "    return uint32_t(",
        "races",
    ),
]


def run(*command: object) -> None:
    subprocess.run([str(c) for c in command], check=True)


def compile_to(compiler: str, source: Path, to: Path, *flags: str) -> Path:
    run(compiler, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", to)
    return to


def plant(bug: Bug, csrc: Path) -> None:
    path = csrc / "cuda" / bug.file
    pieces = path.read_text().split(bug.old)
    if len(pieces) <= bug.count:
        raise SystemExit(
            f"planted_bugs: {bug.file} no longer has occurrence {bug.count} of: {bug.old!r}"
        )
    before, after = bug.old.join(pieces[: bug.count]), bug.old.join(pieces[bug.count :])
    path.write_text(before + bug.new + after)


def first_failure(binary: Path, test: str) -> str:
    """The first failed check of the test; '' if the test passes."""
    # A bug may never end. CPU time, not the clock, limits it: a busy machine must not fail the
    # test.
    command = [
        "sh",
        "-c",
        'ulimit -S -t 600; exec "$@"',
        "sh",
        str(binary),
        *([test] if test != "attention" else []),
    ]
    env = {**os.environ, "SIMT_STOP_AT_FIRST": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = [
        line.removeprefix("FAILED ")
        for line in result.stdout.splitlines()
        if line.startswith("FAILED ")
    ]
    return lines[0] if lines else f"the test ended with status {result.returncode}"


def caught_by(
    bug: Bug | None, test: str, compiler: str, work: Path, objects: dict[str, Path]
) -> str:
    """What catches the bug, or '' if nothing does. Without a bug: what fails with the sound
    kernels."""
    csrc = Path(tempfile.mkdtemp(dir=work))
    shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
    if bug:
        plant(bug, csrc)
    group = test if test in KERNELS else "ops"
    traced = "traced " if group == "races" else ""
    linked = [objects[name] for name in TESTS[group]]
    for kernel in KERNELS[group]:
        source = csrc / "cuda" / kernel
        touched = bug and (kernel == bug.file or f'"{bug.file}"' in source.read_text())
        # A failing test is short, so optimizing it does not pay.
        flags = TRACED if traced else ["-O0"]
        built = (
            compile_to(compiler, source, csrc / f"{kernel}.o", *flags)
            if touched
            else objects[traced + kernel]
        )
        linked.append(built)
    run(compiler, *(["-no-pie"] if traced else []), *linked, "-o", csrc / "test")
    return first_failure(csrc / "test", test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument(
        "--without-races", action="store_true", help="for compilers that cannot build simt_trace"
    )
    args = parser.parse_args()
    bugs = [
        bug
        for bug in BUGS
        if args.only in bug.name and not (args.without_races and bug.test == "races")
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(folder)
        tests = sorted({bug.test for bug in bugs})
        groups = {test if test in KERNELS else "ops" for test in tests}
        wanted: dict[str, tuple[Path, list[str]]] = {}
        for group in groups:
            traced = group == "races"
            for name in TESTS[group]:
                source = CSRC / "cpu" / name if name == "sampling.cpp" else HERE / name
                wanted[name] = source, TRACED if name == "test_trace.cpp" else ["-O2"]
            for name in KERNELS[group]:
                wanted["traced " * traced + name] = (
                    CSRC / "cuda" / name,
                    TRACED if traced else ["-O2"],
                )
        compiled = pool.map(
            lambda name: compile_to(
                args.compiler, wanted[name][0], work / f"{name}.o", *wanted[name][1]
            ),
            wanted,
        )
        objects = dict(zip(wanted, compiled, strict=True))
        unsound = list(
            pool.map(lambda test: caught_by(None, test, args.compiler, work, objects), tests)
        )
        if any(unsound):
            raise SystemExit(
                f"planted_bugs: the tests fail without a bug: {[what for what in unsound if what]}"
            )
        missed = 0
        outcomes = pool.map(
            lambda bug: caught_by(bug, bug.test, args.compiler, work, objects), bugs
        )
        for bug, what in zip(bugs, outcomes, strict=True):
            print(f"{bug.name:50} {what or 'NOT CAUGHT'}", flush=True)
            missed += not what
    print(f"planted bugs: {len(bugs) - missed} passed, {missed} failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
