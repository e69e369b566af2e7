"""Plants one bug at a time in the primitives' inline PTX, which the SIMT machine never sees, and
    shows what catches it.

    python tests/native/ptx/planted_bugs.py build/ptx [--only WORD] [--kernels]

Needs what `make ptx-check` has built, and nvcc. The probe must catch a bug, or a kernel if it is
one that the probe cannot show; with --kernels a kernel is tried with each. Prints a Markdown table,
a row per bug; exits with 1 if one
is not caught, or if the text that it replaces is no longer in the source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
NVCC = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_80,code=compute_80",
    "--no-compress",
    "-DPROBE=probe_ptx",
]
SKIPPED = 77

FORWARD, BACKWARD, DECODE = "attention_forward", "attention_backward", "attention_decode"
SAMPLING, LOGPROB, NORM = "sampling", "token_logprob", "layer_norm"
ARGUMENTS = {
    FORWARD: "bf16",
    BACKWARD: "bf16",
    DECODE: "decode",
    SAMPLING: "sample",
    LOGPROB: "logprob",
    NORM: "norm",
}


@dataclass(frozen=True)
class Bug:
    name: str
    old: str
    new: str
    kernel: str  # that shows it
    harmless: bool = False  # nothing can show it


PACK = 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));'
PACKED_BACKWARDS = 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(low), "f"(high));'
WORDS = '"=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])\n               : "l"(global_address(p))'
STORED = '"l"(global_address(p)), "r"(v.word[0]), "r"(v.word[1]) : "memory"'
FENCE = 'asm volatile("fence.acq_rel.gpu;" ::: "memory");'
BUGS = [
    Bug("packed bf16: operands swapped", PACK, PACKED_BACKWARDS, NORM),
    Bug(
        "packed f16: operands swapped",
        PACK.replace("bf", "f"),
        PACKED_BACKWARDS.replace("bf", "f"),
        NORM,
    ),
    Bug("packed bf16: truncated", "cvt.rn.bf16x2", "cvt.rz.bf16x2", NORM),
    Bug("float of f16: of the wrong bits", '"h"(x.bits)', '"h"(uint16_t(x.bits ^ 1))', LOGPROB),
    Bug("ldmatrix_transposed: .trans missing", "x4.trans.shared", "x4.shared", FORWARD),
    Bug(
        "ldmatrix: two registers swapped",
        "x4.shared.b16 {%0, %1, %2",
        "x4.shared.b16 {%0, %2, %1",
        FORWARD,
    ),
    Bug(
        "mma: rows and columns of a exchanged",
        '"r"(a[1]), "r"(a[2])',
        '"r"(a[2]), "r"(a[1])',
        FORWARD,
    ),
    Bug("mma: b's registers swapped", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', FORWARD),
    Bug(
        "mma: d's rows and columns exchanged",
        '"=f"(d[1]), "=f"(d[2])',
        '"=f"(d[2]), "=f"(d[1])',
        FORWARD,
    ),
    Bug("mma<f16> multiplies as bf16", "f32.f16.f16.f32", "f32.bf16.bf16.f32", FORWARD),
    Bug(
        "wait_group: one too many pending",
        '"n"(kPendingGroups)',
        '"n"(kPendingGroups + 1)',
        FORWARD,
    ),
    Bug(
        "commit_group missing", 'asm volatile("cp.async.commit_group;" ::: "memory");', "", FORWARD
    ),
    Bug("cp.async: not valid, but not zeros", '"r"(valid ? 16 : 0)', '"r"(16)', FORWARD),
    Bug("cp.async: 8 of 16 bytes", '"r"(valid ? 16 : 0)', '"r"(valid ? 8 : 0)', FORWARD),
    Bug(
        "shuffle_xor: width 16",
        "(0xffffffffu, value, mask)",
        "(0xffffffffu, value, mask, 16)",
        LOGPROB,
    ),
    Bug(
        "shuffle: width 16",
        "(0xffffffffu, value, source)",
        "(0xffffffffu, value, source, 16)",
        SAMPLING,
    ),
    Bug(
        "shuffle_xor: half of the lanes are members",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0xffffu",
        NORM,
    ),
    Bug("ballot: inverted", "(0xffffffffu, predicate)", "(0xffffffffu, !predicate)", SAMPLING),
    Bug("spread_signs: halves exchanged", "0xcc88u", "0x88ccu", FORWARD),
    Bug("spread_signs: bytes copied", "0xcc88u", "0x4400u", FORWARD),
    Bug(
        "load16: two words swapped",
        WORDS,
        WORDS.replace("word[1]", "word[4]")
        .replace("word[2]", "word[1]")
        .replace("word[4]", "word[2]"),
        DECODE,
    ),
    Bug(
        "store8: words swapped",
        STORED,
        STORED.replace("word[0]", "word[2]")
        .replace("word[1]", "word[0]")
        .replace("word[2]", "word[1]"),
        NORM,
    ),
    Bug(
        "load16_shared: two words swapped",
        "ld.shared.v4.u32 {%0, %1,",
        "ld.shared.v4.u32 {%1, %0,",
        BACKWARD,
    ),
    Bug("load16: ld.global.nc", "ld.global.v4", "ld.global.nc.v4", BACKWARD),
    Bug(
        "generic address in place of a global one", "__cvta_generic_to_global(p)", "size_t(p)", NORM
    ),
    Bug(
        "exp2_fast: of 1.0001 x",
        'ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)',
        'ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.0001f)',
        FORWARD,
    ),
    Bug(
        "log2_fast: of 1 / x",
        'lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)',
        'lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 / x)',
        FORWARD,
    ),
    Bug(
        "add_rn and mul_rn: contracted to an FMA",
        "return __fadd_rn(a, b); }\n__device__ __forceinline__ float "
        "mul_rn(float a, float b) { return __fmul_rn(a, b)",
        "return a + b; }\n__device__ __forceinline__ float mul_rn(float a, float b) { return a * b",
        SAMPLING,
    ),
    Bug(
        "add_rn: a plain + (mul.rn is never fused)",
        "__fadd_rn(a, b)",
        "a + b",
        SAMPLING,
        harmless=True,
    ),
    Bug(
        "atomic_add_shared: a plain +",
        "atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));",
        "*p += x;",
        SAMPLING,
    ),
    Bug("lowest_bit: off by one", "__ffs(int(x)) - 1", "__ffs(int(x))", SAMPLING),
    Bug("sync_warp: nothing", "__syncwarp();", "", FORWARD),
    Bug("sync_block: nothing", "{ __syncthreads(); }", "{}", FORWARD),
    Bug("post: relaxed, not release", "st.release.gpu", "st.relaxed.gpu", BACKWARD),
    Bug("post: a weak store", "st.release.gpu.global", "st.global", BACKWARD),
    Bug("wait_for: no fence", FENCE, "", BACKWARD),
    Bug("wait_for: does not wait", "while (seen != value) seen = peek(flag);", "", BACKWARD),
    Bug(
        "take_ticket: the block's index",
        "return atomicAdd(counter, 1);",
        "return int(blockIdx.x) + 0 * *counter;",
        BACKWARD,
    ),
    Bug(
        'load16: no "memory" clobber',
        WORDS + '\n               : "memory"',
        WORDS,
        NORM,
        harmless=True,
    ),
    Bug(
        "mma: not volatile",
        'asm volatile(\n      "mma',
        'asm(\n      "mma',
        BACKWARD,
        harmless=True,
    ),
]


def plant(bug: Bug, csrc: Path) -> None:
    path = csrc / "cuda" / "primitives.cuh"
    inline, rest = path.read_text().split("#else", 1)
    if bug.old not in inline:
        raise SystemExit(f"planted_bugs: primitives.cuh no longer has, before #else: {bug.old!r}")
    path.write_text(inline.replace(bug.old, bug.new) + "#else" + rest)


def first_failure(
    nvcc: str, source: Path, test: str, build: Path, work: Path, argument: str = ""
) -> str:
    """What fails when `test` runs with the PTX of `source` in place of its own; '' if nothing
    does."""
    built, binary = work / f"{source.stem}.ptx.o", work / test
    command = [nvcc, *NVCC, "-c", str(source), "-o", str(built)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        return "does not compile: " + compiled.stderr.splitlines()[0]
    others = (
        []
        if test == "ptx_probe"
        else [p for p in build.glob("*.ptx.o") if p.stem not in (built.stem, "probe.ptx")]
    )
    libraries = [build / f"lib{test}_host.a", build / "libptx.a"]
    subprocess.run(["c++", built, *others, *libraries, "-o", binary], check=True)
    env = {**os.environ, "SIMT_STOP_AT_FIRST": "1"}
    ran = subprocess.run(
        [str(binary), *filter(None, [argument])], env=env, capture_output=True, text=True
    )
    if ran.returncode == 0:
        return ""
    lines = [
        line.removeprefix("FAILED ")
        for line in ran.stdout.splitlines()
        if line.startswith("FAILED ")
    ]
    return (
        re.sub(r"^.*Params\): |, of \w+ and .*", "", lines[0])
        if lines
        else f"status {ran.returncode}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--kernels", action="store_true")
    args = parser.parse_args()
    nvcc = shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    )
    if nvcc is None:
        print("planted_bugs is SKIPPED: no nvcc, so no bugs are planted in the primitives' PTX")
        return SKIPPED
    missed = 0
    bugs = [bug for bug in BUGS if args.only in bug.name]
    print(
        "| planted in `primitives.cuh` | SIMT | probe | ptx-check | what it says |\n|---|---|---|---|---|"
    )
    for bug in bugs:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            shutil.copytree(CSRC, work / "csrc")
            plant(bug, work / "csrc")
            probe = work / "tests" / "native" / "ptx"
            probe.mkdir(parents=True)
            for name in ("probe.cu", "probe.h"):
                shutil.copy(HERE / name, probe)
            shown = first_failure(nvcc, probe / "probe.cu", "ptx_probe", args.build, work)
            kernel = ""
            if args.kernels or not shown:
                test = "ptx_attention" if bug.kernel in (FORWARD, BACKWARD) else "ptx_ops"
                source = work / "csrc" / "cuda" / f"{bug.kernel}.cu"
                kernel = first_failure(nvcc, source, test, args.build, work, ARGUMENTS[bug.kernel])
        tried = args.kernels or not shown
        cells = ["no", "**yes**" if shown else "no", "**yes**" if kernel else "no" if tried else ""]
        print(f"| {bug.name} | {' | '.join(cells)} | {(shown or kernel)[:100]} |", flush=True)
        missed += not (shown or kernel or bug.harmless)
    print(f"planted bugs: {len(bugs) - missed} passed, {missed} failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
