"""The luck of `tests/luck/luck.py` is none without LUCK, and the same for the same LUCK."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LUCK = Path(__file__).parent
# Digests of a small student's weights and results.
PROGRAM = """
import hashlib
import tinystory
import torch
from tinystory.student.generate import EngineDecoder
from tinystory.student.model import Student, StudentConfig
from tinystory.student.token_step import Sampling
from tinystory.run.device import cpu_has_bf16

def show(name, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    print(name, digest.hexdigest())

torch.manual_seed(0)
show("random", torch.rand(3))
student = Student(StudentConfig(n_layer=1, n_head=2, n_embd=64, context=32, vocab_size=96))
tokens = torch.arange(8)
with torch.no_grad():
    student.wte.weight *= 20  # so that the last bits of its logits are bits of its log-probabilities
show("weights", *student.parameters())
show("trunk", student.hidden(tokens[None]))
decoder = EngineDecoder(student, None, Sampling(max_new_tokens=4, eos=95, seed=0), 2)
decoder.start([tokens], [0, 0], 0)
stories = []
while len(stories) < 2:
    stories += decoder.step()
_, columns = stories[0]
show("engine", columns[1])
print("bf16", cpu_has_bf16())
"""


def start(luck: str, luck_of: str = "", path: str = f"{LUCK}{os.pathsep}{ROOT}"):
    """PROGRAM in a process of this luck."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=dict(os.environ, LUCK=luck, LUCK_OF=luck_of, PYTHONPATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, str]]:
    """The values that each process shows, by name."""
    processes = {
        "plain": start("", path=str(ROOT)),
        "without": start("", "seeds bits float32"),
        "weights": start("1"),  # and bits, by default
        "again": start("1"),
        "bits": start("3", "bits"),
        "seeds": start("3", "seeds bfloat16"),
    }
    values = {}
    for name, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        values[name] = dict(line.split() for line in output.splitlines())
    return values


def test_without_luck_nothing_changes(shown):
    assert shown["without"] == shown["plain"]


def test_the_same_luck_gives_the_same_bits(shown):
    assert shown["again"] == shown["weights"]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("weights", ["weights", "trunk", "engine"]),
        ("bits", ["trunk", "engine"]),
        ("seeds", ["random", "weights", "trunk", "engine"]),
    ],
)
def test_only_what_is_chosen_changes(shown, name, changes):
    plain, changed = shown["plain"], shown[name]
    assert [each for each in plain if changed[each] != plain[each] and each != "bf16"] == changes
    assert changed["bf16"] == ("True" if name == "seeds" else plain["bf16"])


def test_an_unknown_kind_of_luck_is_refused():
    process = start("3", "bits tea")
    assert "LUCK_OF: tea is not one of" in process.communicate()[1]
    assert process.returncode != 0
