"""Print the state of this machine's compiler, kernels, GPU and cache, and the reason if one is
missing.

    python scripts/doctor.py                                          the machine
    python scripts/doctor.py --teacher-url http://127.0.0.1:11434/v1  ... and the teacher's abilities
    python scripts/doctor.py --teacher-url URL --calibrate            ... and how well it can judge
    python scripts/doctor.py --reward my_reward.py:score --calibrate  how well a function can judge
    python scripts/doctor.py --calibrate                              how well the built-in teacher can

The command builds nothing and changes nothing. Probing a teacher takes about six short requests.
--calibrate measures how well a teacher judges texts of known quality, and with --init texts by that
student. Without --teacher-prompt it compares all prompts, each with about 200 requests or
more (--per-kind sets the number). Replies are kept, so after Ctrl-C the same command continues. To
test a human teacher, run scripts/teach.py and give the URL of its page."""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)

from tinystory.config import InteractConfig
from tinystory.config.command_line import typed_config
from tinystory.config.presets import TEACHER_DEFAULTS
from tinystory.config.record import given_again
from tinystory.data.builtin import dull
from tinystory.data.corpus import BUILTIN
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate import calibration
from tinystory.evaluate.corruptions import (
    DULL,
    KINDS,
    KnownStory,
    corpus_documents,
    known_stories,
    worked_examples,
)
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import UserError, command
from tinystory.run.options import add_number, add_options, arguments, script_parser
from tinystory.run.paths import cache_dir, hint
from tinystory.run.terminal import aligned
from tinystory.teacher.client import Teacher
from tinystory.teacher.endpoint import HUMAN
from tinystory.teacher.grade import Grader
from tinystory.teacher.named_protocols import PROTOCOLS

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
GRADER = (
    "teacher_url teacher_model teacher_max_tokens teacher_extra teacher_prompt teacher_concurrency "
    "price_in price_out reward"
).split()
STUDENT = "init openings temperature max_new_tokens device".split()
DEMO_OPENING = (
    "Once upon a time, a fox lived in a hole under the old oak. One day, the fox found a map."
)
FIRST_INDEX = 3_500_000_000  # of the student's first text: no other texts use these random numbers


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_options(parser, InteractConfig, GRADER)
    add(
        "--calibrate",
        action="store_true",
        help="measure how well the teacher (default: the built-in one) judges texts",
    )
    add_number(parser, "--per-kind", calibration.FULL, "[2, 1e6]", "number of texts of each kind")
    add(
        "--corpus",
        nargs="+",
        default=["builtin"],
        metavar="NAME|FILE",
        help="corpus of the texts of known quality (default: builtin)",
    )
    add(
        "--replies",
        type=Path,
        metavar="FILE",
        help="file for the teacher's replies (default: in the cache folder)",
    )
    add_options(parser, InteractConfig, STUDENT)
    options = parser.parse_args(argv)
    config = typed_config(options, GRADER + STUDENT)

    for component, state in machine():
        print(f"{component:10} {state}", flush=True)
    if options.calibrate:
        calibrate(config, options)
    elif config.teacher_url or config.reward:
        print(f"{'requests':10} about six short ones", flush=True)
        from tinystory.evaluate.forecast import demo_stories  # imports torch

        with open_grader(config) as grader:
            forecast = grader.forecast(demo_stories(config.teacher_prompt), DEMO_OPENING)
            if forecast:
                print(f"{'the demo':10} {forecast}")


def calibrate(config: InteractConfig, options: argparse.Namespace) -> None:
    """Print how the teacher scores texts of known quality. For a language model without
    --teacher-prompt: by each prompt."""
    kinds = (*KINDS, DULL) if set(options.corpus) <= set(BUILTIN) else KINDS
    known = known_stories(corpus_documents(options.corpus), options.per_kind, kinds)
    if config.init:
        known += student_texts(config, options.per_kind)
    prompts = [config.teacher_prompt]
    replies = options.replies
    if config.teacher_url:
        prompts = [config.teacher_prompt] if config.teacher_prompt else list(PROTOCOLS)
        replies = replies or kept_replies(config)
    elif not config.reward:
        fitting = "the built-in teacher to this corpus, which flatters it; about half a minute"
        print(f"{'fitting':10} {fitting}", flush=True)

    results: dict[str, dict[str, Any]] = {}
    try:
        for prompt in prompts:
            name = prompt or config.reward or "the teacher"
            print(f"{'asking':10} {name}", flush=True)
            with open_grader(
                replace(config, teacher_prompt=prompt, any_model=True),
                corpus=options.corpus,
                replies=replies,
                examples=lambda: worked_examples(corpus_documents(options.corpus)),
            ) as grader:
                is_human = isinstance(grader, Teacher) and grader.model == HUMAN
                if is_human:
                    prompts = [prompt]
                if prompt == prompts[0]:
                    print_forecast(grader, known, len(prompts))
                try:
                    results[name] = measured(grader, known)
                    cached = grader.stats().get("teacher_cached")
                    if cached:
                        again = f"to ask again, delete {replies}"
                        print(f"{'':10} {cached} of these replies are from before: {again}")
                except calibration.NoScores as error:
                    print(f"{'':10} {error}", flush=True)
            if len(prompts) > 1 and name in results:
                print_table({name: results[name]})
            if is_human:
                break
    except KeyboardInterrupt:
        if replies:
            print(
                f"{'stopped':10} all replies so far are kept in {replies}: the same command continues"
            )
        raise

    print_table(results)
    print_choice(config, options.corpus, results)


def kept_replies(config: InteractConfig) -> Path:
    """The default of --replies: a file for each teacher, because two servers may give the same name to
    different models."""
    teacher = json.dumps([config.teacher_url, config.teacher_model])
    name = hashlib.sha256(teacher.encode()).hexdigest()[:8]
    return cache_dir() / f"doctor_replies-{name}.jsonl"


def print_forecast(grader: Grader, known: Sequence[KnownStory], prompts: int) -> None:
    """Print what all prompts cost together. A prompt has at most as many requests as
    the first one."""
    forecast = grader.forecast(prompts * len(known), known[0].opening) or f"{len(known)} texts"
    title = f"{prompts} prompts x {len(known)} texts: " if prompts > 1 else ""
    print(f"{'forecast':10} {title}{forecast}", flush=True)


def measured(grader: Grader, known: Sequence[KnownStory]) -> dict[str, Any]:
    """The result of calibrating a grader, with the seconds per text."""
    began = time.perf_counter()
    calibration.fit_scale(grader, known)
    result = calibration.calibrate(calibration.of_grader(grader), known)
    result["seconds"] = (time.perf_counter() - began) / len(known)
    return result


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one column for each prompt."""
    columns = [calibration.table(prompt, result) for prompt, result in results.items()]
    rows = [[line[0][0], *(cells[-1] for cells in line)] for line in zip(*columns, strict=True)]
    for line in aligned(rows):
        print(f"{'':10} {line}", flush=True)


def print_choice(
    config: InteractConfig, corpus: Sequence[str], results: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print which prompt judges best (on the student's own texts, if --init gives a student),
    and the command for a run with it."""
    known = {prompt: result for prompt, result in results.items() if result["best_auc"] is not None}
    if not known:
        print(f"{'verdict':10} this teacher gave no scores: choose another model")
        return
    best = max(known, key=lambda prompt: calibration.value_as_teacher(known[prompt]))
    prompt = f", asked {best}," if len(results) > 1 else ""
    print(f"{'verdict':10} the teacher{prompt} {calibration.verdict(known[best])}")
    if not calibration.can_judge(known[best]):
        print(f"{'':10} choose another model, or test more texts (--per-kind)")
    elif config.teacher_url:
        words = arguments(InteractConfig, TEACHER_DEFAULTS | {"teacher_prompt": best})
        words += given_again(replace(config, teacher_prompt=""))
        if config.init:
            words += ["--init", config.init]
        if list(corpus) != ["builtin"]:
            words += ["--corpus", *corpus]
        print(f"{'next':10} {hint('train_interact.py', *words)}")


def student_texts(config: InteractConfig, count: int) -> list[KnownStory]:
    """`count` texts by the student at --init; twice as many if the built-in grammar can classify
    them as stories and dull text."""
    from tinystory.evaluate.story_records import learned_dull_text
    from tinystory.ops.compute import pick_device
    from tinystory.student import checkpoint
    from tinystory.student.generate import generate

    student, tokenizer, history = checkpoint.load(
        checkpoint.find(Path(config.init)), pick_device(config.device)
    )
    student.divide_logits(config.temperature)
    knows_dull = learned_dull_text(history)
    openings = Openings(load_openings(config.openings), config.seed, 1)
    texts = generate(
        student,
        None,
        tokenizer,
        [openings[i] for i in range(count * (2 if knows_dull else 1))],
        first_index=FIRST_INDEX,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    known = []
    for text in texts:
        kind = calibration.STUDENT
        if knows_dull:
            is_story = dull.style_of(text.text) == dull.STORY
            kind = calibration.STUDENT_STORY if is_story else calibration.STUDENT_DULL
        known.append(KnownStory(kind, text.opening, text.text))
    return known


def machine() -> Iterator[tuple[str, str]]:
    """Yields (component, state) in the order in which the components are needed, each as soon as it
    is known. PyTorch is imported late, because the import takes seconds."""
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
    yield "gpu", gpus() or "none that this torch can use: see the output of nvidia-smi"
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
        return "not built yet for this compiler, processor and torch, or damaged: the next run builds them"
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
        return f"{folder} cannot be written: set TINYSTORY_CACHE to a writable folder"
    return f"{folder}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free"


if __name__ == "__main__":
    main()
