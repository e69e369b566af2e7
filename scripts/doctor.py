"""Report this machine's compiler, kernels, GPU and cache, and why any of them is missing.

    python scripts/doctor.py                                          the machine
    python scripts/doctor.py --teacher-url http://127.0.0.1:11434/v1  ... and what the teacher can do
    python scripts/doctor.py --teacher-url URL --calibrate            ... and whether it can judge
    python scripts/doctor.py --reward my_reward.py:score --calibrate  the same for a callable
    python scripts/doctor.py --calibrate                              the same for the built-in teacher

It builds nothing and changes nothing. Asking a teacher takes about eight short requests,
calibrating it 200 more. A human is a teacher too: run scripts/teach.py, and give its URL.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)

from tinystory.config import InteractConfig, typed_config
from tinystory.evaluate.calibration import (
    FULL,
    calibrate,
    of_grader,
    table,
    verdict,
)
from tinystory.evaluate.corruptions import corpus_documents, known_stories
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.options import add_number, add_options, script_parser
from tinystory.run.paths import cache_dir
from tinystory.run.terminal import aligned
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

PACKAGES = (
    "pybind11",
    "ninja",
    "setuptools",
    "numpy",
    "tokenizers",
    "tiktoken",
    "safetensors",
    "openai",
    "httpx2",
    "aiohttp",
    "tqdm",
    "huggingface_hub",
    "transformers",  # the last two are optional
)
GRADER = "teacher_url teacher_model teacher_max_tokens teacher_extra teacher_prompt teacher_concurrency reward".split()


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_options(parser, InteractConfig, GRADER)
    add(
        "--calibrate",
        action="store_true",
        help="measure how well the teacher, or the built-in one, judges stories",
    )
    add_number(parser, "--per-kind", FULL, "[2, 1e6]", "stories of each kind")
    add(
        "--corpus",
        nargs="+",
        default=["builtin"],
        metavar="NAME|FILE",
        help="their corpus (default: builtin)",
    )
    options = parser.parse_args(argv)
    config = typed_config(options, GRADER)

    for component, state in machine():
        print(f"{component:10} {state}", flush=True)
    if config.teacher_url:
        print(f"{'requests':10} about eight short ones come first", flush=True)
    elif options.calibrate and not config.reward:
        fitting = "the built-in teacher to this corpus, which flatters it; about half a minute"
        print(f"{'fitting':10} {fitting}", flush=True)
    if config.teacher_url or config.reward or options.calibrate:
        with open_grader(config, builtin_teacher, corpus=options.corpus) as grader:
            if options.calibrate:
                calibration(config.reward or "teacher", grader, options)


def calibration(name: str, grader: Grader, options: argparse.Namespace) -> None:
    """Print how a teacher scores known stories."""
    known = known_stories(corpus_documents(options.corpus), options.per_kind)
    forecast = grader.forecast(len(known), known[0].opening) or f"{len(known)} stories"
    print(f"{'forecast':10} {forecast}", flush=True)
    began = time.perf_counter()
    result = calibrate(of_grader(grader), known)
    speed = len(known) / (time.perf_counter() - began)
    rows = [*table(name, result), ["stories per second", f"{speed:.3g}"]]
    for line in aligned(rows):
        print(f"{'':10} {line}")
    print(f"{'judgement':10} the teacher {verdict(result)}")


def machine() -> Iterator[tuple[str, str]]:
    """(component, state) in the order in which one needs them, each as soon as it is known: torch,
    and what needs it, is imported late because that takes seconds."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    import torch

    from tinystory.run.device import cpu_has_bf16

    yield "torch", torch.__version__
    bf16 = "no bfloat16 in hardware: float32 is used"
    if cpu_has_bf16():
        bf16 = "bfloat16 in hardware"
    yield "cpu", f"{os.cpu_count()} processors, {torch.get_num_threads()} torch threads; {bf16}"
    yield "compiler", tried(compiler)
    yield "kernels", tried(kernels)
    yield "gpu", gpus() or "none that this torch can use: see what nvidia-smi says"
    yield "nvcc", nvcc()
    yield "cache", tried(cache)


def tried(state: Callable[[], str]) -> str:
    try:
        return state()
    except UserError as error:
        return f"none: {error}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def compiler() -> str:
    from tinystory.ops import build

    path, *flags = build.command()
    banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    threads = "OpenMP" if "-fopenmp" in flags else "threads of our own"
    return f"{path}: {(banner or 'it does not say its version').splitlines()[0]}; {threads}"


def kernels() -> str:
    import torch

    from tinystory.ops import backend, build

    if backend.from_environment() == "reference":
        return f"TINYSTORY_KERNELS=reference: {backend.REFERENCE}"
    library = build.library_folder(build.NAME, build.cpu_sources()) / f"{build.NAME}.so"
    if not build.intact(library):
        return "not built yet for this compiler, this processor and this torch, or damaged: the next run builds them"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"built, but they do not load ({error}): delete {library.parent}"
    return f"built, and they load: {library}"


def gpus() -> str:
    import torch

    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB")
    return ", ".join(names)


def nvcc() -> str:
    from tinystory.ops import cuda

    reason = cuda.why_not()
    if reason:
        return f"not used: {reason}"
    return f"{cuda.toolkit()}, for compute capability {', '.join(cuda.architectures())}"


def cache() -> str:
    folder = cache_dir()
    existing = folder.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"{folder} cannot be written: set TINYSTORY_CACHE to a folder that can"
    return f"{folder}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free"


if __name__ == "__main__":
    main()
