"""Which implementation runs an operator; and operators by PyTorch's matmul: the same results as the
kernels'."""

import platform
import subprocess
import sys

import pytest
import torch

from tests.conftest import assert_no_worse, using
from tinystory import ops
from tinystory.ops import autograd, backend, reference
from tinystory.run.errors import UserError
from tinystory.student.model import Student, StudentConfig


@pytest.fixture
def on_a_mac(monkeypatch):
    monkeypatch.setattr(backend, "ACCELERATE", True)
    with using("auto"):
        yield


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.3).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,))


def results(f, hidden, weight, targets, grads):
    hidden.grad = weight.grad = None
    outputs = f(hidden, weight, targets)
    torch.autograd.backward(outputs, grads)
    return [x.detach() for x in (*outputs, hidden.grad, weight.grad)]


@pytest.mark.parametrize("shape", [(1, 32, 5), (37, 64, 300), (70, 32, 1000)])
def test_pytorchs_logprobs_are_the_definitions(monkeypatch, shape):
    monkeypatch.setattr(autograd, "CHUNK", 9000)  # 9 to 1 800 rows at a time
    hidden, weight, targets = problem(*shape, torch.float32)
    grads = torch.randn(shape[0]), torch.randn(shape[0])
    ours = results(autograd.chunked_token_logprob, hidden, weight, targets, grads)
    plain = results(reference.token_logprob, hidden, weight, targets, grads)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    wide = tuple(grad.double() for grad in grads)
    exact = results(reference.token_logprob, exact_hidden, exact_weight, targets, wide)
    for result, theirs, right in zip(ours, plain, exact, strict=True):
        assert result.dtype == theirs.dtype and result.shape == theirs.shape
        # A gradient is a sum of terms as large as the largest result, and some terms cancel.
        assert_no_worse(
            result, theirs, right, "token_logprob", scale=2 * right.abs().max().expand(right.shape)
        )


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    sizes, plain = [], reference.token_logprob

    def record(hidden, weight, ids):
        return sizes.append(len(hidden) * len(weight)) or plain(hidden, weight, ids)

    monkeypatch.setattr(reference, "token_logprob", record)
    monkeypatch.setattr(autograd, "CHUNK", 900)
    hidden, weight, targets = problem(37, 64, 300, torch.float32)
    autograd.chunked_token_logprob(hidden, weight, targets)[0].sum().backward()
    # 13 chunks, forward and again in the backward pass
    assert max(sizes) <= 900 and len(sizes) == 2 * 13


@pytest.mark.parametrize("name", backend.MATMULS)
def test_on_a_mac_pytorch_multiplies_in_float32_unless_the_kernels_are_asked_for(
    monkeypatch, on_a_mac, name
):
    assert backend.implementation(name, torch.zeros(1)) == "pytorch"
    assert backend.implementation(name, torch.zeros(1).double()) == "kernel"
    assert backend.implementation(name, torch.zeros(1).bfloat16()) == "kernel"
    assert backend.implementation("sample", torch.zeros(1)) == "kernel"
    with using("ours"):
        assert backend.implementation(name, torch.zeros(1)) == "kernel"
    monkeypatch.setattr(backend, "ACCELERATE", False)
    assert backend.implementation(name, torch.zeros(1)) == "kernel"


def test_an_operator_by_pytorch_is_not_the_kernel(monkeypatch, on_a_mac):
    calls = []
    monkeypatch.setattr(reference, "linear", lambda x, *_: calls.append("linear") or x)
    monkeypatch.setattr(
        ops, "chunked_token_logprob", lambda x, *_: calls.append("token_logprob") or (x, x)
    )
    hidden, weight, targets = problem(3, 32, 64, torch.float32)
    for kernels in ("ours", "auto"):
        with using(kernels):
            ops.linear(hidden, weight, torch.zeros(64))
            ops.token_logprob(hidden, weight, targets)
            ops.cross_entropy(hidden, weight, targets)
    assert calls == ["linear", "token_logprob", "token_logprob"]


def test_the_environment_chooses_the_back_end(monkeypatch):
    for value, kernels in (("", "auto"), ("ours", "ours"), ("reference", "reference")):
        monkeypatch.setenv("TINYSTORY_KERNELS", value)
        assert backend.from_environment() == kernels
    monkeypatch.setenv("TINYSTORY_KERNELS", "theirs")
    with pytest.raises(
        UserError,
        match="TINYSTORY_KERNELS='theirs' is not a known value: unset it, or set it to 'reference'",
    ):
        backend.from_environment()


def test_the_reference_runs_no_kernel(on_a_mac):
    hidden = torch.randn(3, 32)
    with using("reference"):
        assert ops.load() is None
        for name in ("causal_attention", "linear", "token_logprob"):
            assert backend.implementation(name, hidden) == "reference"
    with using("ours"):
        assert backend.implementation("token_logprob", hidden) == "kernel" and ops.load()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told so")
def test_loading_the_kernels_leaves_malloc_alone_until_it_is_told_to_keep_memory():
    code = r"""
import re
from pathlib import Path
from tinystory.ops import backend

def heap_mb():
    areas = re.findall(r"(\w+)-(\w+) .*\[heap\]", Path("/proc/self/maps").read_text())
    return sum(int(end, 16) - int(begin, 16) for begin, end in areas) >> 20

module = backend.load()
before = heap_mb()
module.keep_freed_memory()
print(before, heap_mb())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 896 <= after


def test_without_kernels_linear_layers_have_no_copies_of_weights(monkeypatch):
    """As on a GPU that is too old for the kernels."""
    student = Student(StudentConfig(1, 1, 32, 8, 40))
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    for kernels, has_copies in (("reference", False), ("auto", True)):
        with using(kernels), student.lowered(torch.bfloat16):
            assert (student.blocks[0].fc.copies is not None) == has_copies
