"""pytest as on other machines: LUCK=1, LUCK=2, ... each give an untrained student, and all that it
writes, other luck.

    LUCK=3 PYTHONPATH=tests/luck .venv/bin/pytest -p luck tests/train

A student of twenty steps writes noise. Which noise depends on the last bits of every sum, so on the
processor, the BLAS and the number of threads: a test may not depend on the text that the student
happens to write. LUCK_OF, or LUCK modulo 3 without it, chooses what differs:

    weights   initial weights: each that `nn.init.normal_` draws is multiplied by 1 + 0.01 x noise,
              as from another seed of almost the same student. Zeros, ones, and weights from files
              stay.
    bits      the last bits of float32 results: what `Student.trunk` and the C++ engine compute moves
              by up to two units in the last place, as with another order of summation. Nothing in
              bfloat16 moves.
    seeds     `torch.manual_seed` and `torch.Generator.manual_seed` get another seed: another student
              altogether, and other random inputs of tests.
    float32   no bfloat16 in hardware, as on processors before Zen 4 and Cooper Lake: `--dtype auto`
              is float32.
    bfloat16  `--dtype auto` is bfloat16, as on later processors; emulated where there is none.

What differs is a function of LUCK and of the value alone: the same computation gives the same bits
again, so that tests of determinism, resumption and batching keep their meaning. torch's own
generator is not touched. The processes that tests start see the same luck (sitecustomize.py).
Without LUCK nothing changes.

This word in the docstring keeps pytest from warning that the module is imported already:
PYTEST_DONT_REWRITE."""

import copy
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

KINDS = {"weights", "bits", "seeds", "float32", "bfloat16"}
BY_DEFAULT = ("seeds bits float32", "weights bits", "weights bits bfloat16")
LUCK = int(os.environ.get("LUCK") or 0)
LUCK_OF = set((os.environ.get("LUCK_OF") or BY_DEFAULT[LUCK % 3]).split())
NOISE = 0.01
ULPS = 2
SEED_SHIFT = LUCK * 1_000_003


def pytest_report_header() -> str:
    """The line by which a failure can be repeated."""
    if LUCK == 0:
        return "luck: none (LUCK is not set)"
    return f'luck: LUCK={LUCK} LUCK_OF="{" ".join(sorted(LUCK_OF))}"'


def pytest_addoption(parser) -> None:
    parser.addoption("--students", action="store_true", help="only tests in which a student writes")


def pytest_collection_modifyitems(config, items) -> None:
    """--students: every student of the tests comes from a fixture that depends on one of these."""
    if not config.getoption("students"):
        return
    chosen = []
    others = []
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        (chosen if "tokenizer" in fixtures or "place" in fixtures else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter) -> None:
    """Repeats the line beside the failures, since -q leaves the header out."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(pytest_report_header())


def change_torch(torch) -> None:
    """Changes initial weights, seeds, and what torch reports about the processor."""
    if "weights" in LUCK_OF:
        change_initial_weights(torch)
    if "seeds" in LUCK_OF:
        change_seeds(torch)
    if "float32" in LUCK_OF:
        set_bf16(torch, False)
    if "bfloat16" in LUCK_OF:
        set_bf16(torch, True)
        torch.backends.cpu.get_cpu_capability = lambda: "AVX512"


def change_initial_weights(torch) -> None:
    draw = torch.nn.init.normal_
    generator_class = torch.Generator

    def normal_(tensor, *args, **options):
        draw(tensor, *args, **options)
        if tensor.is_meta:  # has a shape only, perhaps of a student that fits no memory
            return tensor
        generator = generator_class(device="cpu")
        generator.manual_seed(LUCK)
        noise = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float32)
        factor = 1 + NOISE * noise
        with torch.no_grad():
            tensor.mul_(factor.to(tensor))
        return tensor

    torch.nn.init.normal_ = normal_


def change_seeds(torch) -> None:
    set_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + SEED_SHIFT)

    def manual_seed(seed):
        return set_seed(int(seed) + SEED_SHIFT)

    torch.Generator = Generator
    torch.manual_seed = manual_seed


def set_bf16(torch, supported: bool) -> None:
    """Whether torch says that the processor has bf16 matmuls."""
    torch.cpu._is_avx512_bf16_supported = lambda: supported
    torch.cpu._is_amx_tile_supported = lambda: supported


def other_bits(x):
    """x, each element moved by up to ULPS units in its last place, by a hash of its bits; with the
    gradient of x. Zeros, infinities and the smallest and largest numbers stay."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if x.dtype != torch.float32:
        return x
    # In bfloat16, trunk and engine must round the same numbers; and no compiled graph may have an
    # operator of ours.
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return x
    if _get_current_dispatch_mode() is not None:  # it counts operators
        return x
    value = x.detach().contiguous()
    bits = value.view(torch.int32)
    key = (bits ^ (LUCK * 0x2545F491 % 2**31)) * -1640531535
    key = (key ^ (key >> 15)) * 739982445
    ulps = (key >> 8) % (2 * ULPS + 1) - ULPS
    moved = (bits + ulps).view(torch.float32)

    limits = torch.finfo(torch.float32)
    size = value.abs()
    moves = (size > 2 * limits.tiny) & (size < limits.max / 2)
    return torch.where(moves, x + (moved - value), x)  # the sum is exactly `moved`


def change_model(model) -> None:
    """The sums of the student's layers, in PyTorch and our kernels."""
    trunk = model.Student.trunk

    def trunk_with_other_bits(self, *args, **options):
        return other_bits(trunk(self, *args, **options))

    if "bits" in LUCK_OF:
        model.Student.trunk = trunk_with_other_bits


def change_generate(generate) -> None:
    """Changes the weights of the C++ engine instead of the sums."""
    init = generate.EngineDecoder.__init__

    def init_with_other_bits(self, student, *args, **options):
        student = copy.deepcopy(student)
        for parameter in student.parameters():
            parameter.data = other_bits(parameter.data)
        init(self, student, *args, **options)

    if "bits" in LUCK_OF:
        generate.EngineDecoder.__init__ = init_with_other_bits


CHANGES = {
    "torch": change_torch,
    "tinystory.student.model": change_model,
    "tinystory.student.generate": change_generate,
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes a module right after the import, since tinystory must be imported before torch."""

    def find_spec(self, name, path, target=None):
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None, name
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def begin() -> None:
    """Changes what is imported from now on, here and in the processes that are started."""
    unknown = LUCK_OF - KINDS
    if unknown:
        sys.exit(f"LUCK_OF: {' '.join(sorted(unknown))} is not one of {' '.join(sorted(KINDS))}")
    assert "torch" not in sys.modules, "luck comes before torch: put tests/luck on PYTHONPATH"
    sys.meta_path.insert(0, Finder())
    here = str(Path(__file__).resolve().parent)
    paths = [here]
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if path and path != here:
            paths.append(path)
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


if LUCK > 0:
    begin()
