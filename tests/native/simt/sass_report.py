"""Registers, spills and instructions per HMMA of the CUDA kernels' machine code (sm_90), held to
budgets.txt.

Needs nvcc and cuobjdump with nvdisasm (CUDA's toolkit, or `pip install '.[cuda-tools]'`), but no
GPU. Without these tools the script says so and exits with status 77, which ctest shows as skipped.

Instructions per HMMA are those that a warp issues in one iteration of the tile loop, over the HMMA
among them: in an interior tile (the budget), which is not masked, has maxima not far above earlier
ones, and passes dQ on to another block; and with no branch taken."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[2] / "csrc" / "cuda"
ARCH, SKIPPED = "sm_90", 77
D = 64
# The bf16 kernels with D = 64: fragments per warp and tile (kMmaM, kMmaN), and GEMMs per tile.
SHAPES = {"attention_forward_kernel": (2, 8, 2), "attention_backward_kernel": (2, 4, 5)}
LONG = 24  # instructions: shorter stretches that a branch skips are counted


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    conditional: bool
    target: int | None  # of a branch


def find_tool(name: str) -> str | None:
    """The tool on PATH, in CUDA_HOME, in /usr/local/cuda, or in a wheel of this Python."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    for packages in map(Path, site.getsitepackages()):
        places += [*packages.glob("nvidia/*/bin"), packages / "triton/backends/nvidia/bin"]
    return shutil.which(name) or next(
        (path for place in places if (path := shutil.which(name, path=place))), None
    )


def build(nvcc: str, source: Path, out: Path) -> tuple[Path, str]:
    cubin = out / f"{source.stem}.cubin"
    flags = f"-std=c++20 -O3 -arch={ARCH} -Xptxas -v -cubin".split()
    command = [nvcc, *flags, "-o", str(cubin), str(source)]
    return cubin, subprocess.run(command, capture_output=True, text=True, check=True).stderr


def short_name(mangled: str) -> str:
    """'..24attention_forward_kernelINS0_4bf16ELi64ELb0EEE..' ->
    'attention_forward_kernel<bf16,64,false>'."""
    match = re.search(
        r".*\d([a-z]\w*?_kernel)I(?:NS0_\d(b?f16)E|f)(?:Li(\d+)E)?(?:Lb([01])E)?", mangled
    )
    if match is None:
        raise SystemExit(f"sass_report: not a kernel of ours: {mangled}")
    arguments = [match[2] or "float", match[3], {"0": "false", "1": "true", None: None}[match[4]]]
    return f"{match[1]}<{','.join(filter(None, arguments))}>"


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spill stores, by kernel."""
    entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {
        short_name(n): (int(used), int(spilled))
        for n, spilled, used in re.findall(entry, log, re.DOTALL)
    }


def read_sass(cuobjdump: str, path: str, cubin: Path) -> dict[str, list[Instruction]]:
    env = {**os.environ, "PATH": path}
    command = [cuobjdump, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    kernels: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            body = kernels.setdefault(short_name(match[1]), [])
        elif match := re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", line
        ):
            target = re.search(r"0x([0-9a-f]+)\s*$", match[4]) if match[3] == "BRA" else None
            branch = int(target[1], 16) if target else None
            body.append(Instruction(int(match[1], 16), match[3], match[2] is not None, branch))
    return kernels


def issued(body: list[Instruction], everything: bool) -> tuple[int, int]:
    """Instructions and HMMA that a warp issues in an iteration of the tile loop, the largest loop
    with HMMA.

    Unless `everything`, a conditional branch forward is taken if it skips LONG instructions or
    more, and among them neither HMMA nor copies.
    """

    def has(lines: list[Instruction], *names: str) -> bool:
        return any(i.name.startswith(names) for i in lines)

    def between(begin: int, end: int) -> list[Instruction]:
        return [i for i in body if begin <= i.address < end]

    ends = [i for i in body if i.target is not None and i.conditional and i.target < i.address]
    loops = [between(i.target or 0, i.address + 1) for i in ends]
    tile_loop = max((loop for loop in loops if has(loop, "HMMA")), key=len)
    count = hmma = 0
    skip_to = 0
    for i in tile_loop:
        if i.address < skip_to:
            continue
        count += 1
        hmma += i.name.startswith("HMMA")
        if i.target is not None and i.target > i.address:
            skipped = between(i.address + 1, i.target)
            rare = len(skipped) >= LONG and not has(skipped, "HMMA", "LDGSTS")
            if not i.conditional or (rare and not everything):
                skip_to = i.target
    return count, hmma


def instructions_per_hmma(kernel: str, body: list[Instruction]) -> tuple[float, float]:
    """Counts in an interior tile, and with no branch taken."""
    m, n, gemms = SHAPES[kernel.split("<")[0]]
    ratios = []
    for everything in (False, True):
        count, hmma = issued(body, everything)
        if hmma != gemms * m * n * (D // 16):
            raise SystemExit(
                f"sass_report: {kernel}: {hmma} HMMA per tile found, not {gemms * m * n * (D // 16)}"
            )
        ratios.append(count / hmma)
    return ratios[0], ratios[1]


def budgets() -> dict[str, float]:
    """Instructions per HMMA, by kernel."""
    rows = [
        line.split()
        for line in (HERE / "budgets.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    return {row[1]: float(row[5]) for row in rows if row[5] != "-"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--budgets", action="store_true", help="compile only the kernels that have a budget"
    )
    args = parser.parse_args()
    nvcc, cuobjdump, nvdisasm = map(find_tool, ("nvcc", "cuobjdump", "nvdisasm"))
    if not (nvcc and cuobjdump and nvdisasm):
        missing = "nvcc" if not nvcc else "cuobjdump" if not cuobjdump else "nvdisasm"
        print(
            f"sass_report is SKIPPED: no {missing}, so registers, spills and instructions per HMMA are not checked"
        )
        return SKIPPED
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    sources = sorted(CUDA.glob("attention_*ward.cu" if args.budgets else "*.cu"))
    limits, failures = budgets(), 0
    print(f"{ARCH:42} registers  spilled  instructions  per HMMA  budget  with all branches")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for cubin, log in pool.map(lambda source: build(nvcc, source, Path(folder)), sources):
            used = resources(log)
            for kernel, body in sorted(read_sass(cuobjdump, path, cubin).items()):
                registers, spilled = used[kernel]
                row = f"{kernel:42} {registers:9} {spilled:8} {len(body):13}"
                if kernel in limits:
                    ratio, all_branches = instructions_per_hmma(kernel, body)
                    row += f"  {ratio:8.2f}  {limits[kernel]:6.2f}  {all_branches:17.2f}"
                    if ratio > limits[kernel]:
                        failures += 1
                        row += "  FAILED: above its budget"
                if spilled:
                    failures += 1
                    row += "  FAILED: spills"
                print(row)
    print(f"sass_report: {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
