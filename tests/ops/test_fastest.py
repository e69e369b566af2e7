"""Operators by PyTorch's matmul: the same results as the kernels', and chosen where they are faster, once."""

import pytest
import torch

from tests.conftest import assert_no_worse
from tinystory import ops
from tinystory.ops import backend, chunked, fastest, reference
from tinystory.ops.backend import Backend
from tinystory.run.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels_for_all():
    with backend.using(Backend("ours")):
        yield


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.3).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,))


def results(f, hidden, weight, targets, grads):
    hidden.grad = weight.grad = None
    outputs = f(hidden, weight, targets)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, grads[: len(outputs)])
    return [x.detach() for x in (*outputs, hidden.grad, weight.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["token_logprob", "cross_entropy"])
@pytest.mark.parametrize("shape", [(1, 32, 5), (37, 64, 300), (70, 32, 1000)])
def test_pytorchs_logprobs_are_the_definitions(monkeypatch, name, dtype, shape):
    monkeypatch.setattr(chunked, "CHUNK", 9000)  # 9 to 1 800 rows at a time
    backend.run_by_pytorch(name)
    hidden, weight, targets = problem(*shape, dtype)
    grads = (torch.randn(shape[0]), torch.randn(shape[0])) if name == "token_logprob" else (torch.tensor(2.5),)
    ours = results(getattr(ops, name), hidden, weight, targets, grads)
    plain = results(getattr(reference, name), hidden, weight, targets, grads)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    wide = tuple(grad.double() for grad in grads)
    exact = results(getattr(reference, name), exact_hidden, exact_weight, targets, wide)
    for result, theirs, right in zip(ours, plain, exact, strict=True):
        assert result.dtype == theirs.dtype and result.shape == theirs.shape
        # A gradient is a sum of terms as large as the largest result, some of which cancel.
        assert_no_worse(result, theirs, right, name, scale=2 * right.abs().max().expand(right.shape))


def test_an_operator_by_pytorch_is_not_the_kernel(monkeypatch):
    x, weight, bias = torch.randn(7, 64), torch.randn(32, 64), torch.randn(32)
    calls = []
    monkeypatch.setattr(reference, "linear", lambda *arguments: calls.append("pytorch") or arguments[0])
    ops.linear(x, weight, bias)
    assert calls == []
    backend.run_by_pytorch("linear,token_logprob")
    ops.linear(x, weight, bias)
    assert calls == ["pytorch"] and str(backend.current()) == "compiled kernels, PyTorch for linear, token_logprob"
    backend.run_by_pytorch("none")
    ops.linear(x, weight, bias)
    assert calls == ["pytorch"] and str(backend.current()) == "compiled kernels"


def test_the_environment_chooses_the_back_end(monkeypatch):
    for value, kernels in (("", "auto"), ("ours", "ours"), ("reference", "reference")):
        monkeypatch.setenv("TINYSTORY_KERNELS", value)
        assert backend.from_environment() == Backend(kernels)
    monkeypatch.setenv("TINYSTORY_KERNELS", "theirs")
    with pytest.raises(UserError, match="TINYSTORY_KERNELS='theirs' is not known; unset it, or set it to 'reference'"):
        backend.from_environment()


def test_the_reference_runs_no_kernel():
    hidden = torch.randn(3, 32)
    with backend.using(Backend("reference", frozenset(fastest.NAMES))):
        assert ops.load() is None
        for name in ("causal_attention", "linear", "token_logprob"):
            assert backend.implementation(name, hidden) == "reference"
    assert backend.implementation("token_logprob", hidden) == "kernel" and ops.load()


def test_float64_stays_the_kernels(monkeypatch):
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in problem(3, 32, 9, torch.float32))
    backend.run_by_pytorch("token_logprob")
    monkeypatch.setattr(chunked, "token_logprob", None)
    assert ops.token_logprob(hidden, weight, targets)[0].dtype == torch.float64


def test_the_faster_are_chosen_once_per_build_and_dtype(tmp_path, monkeypatch, capsys):
    names = []

    def compare(name, ours, theirs):
        names.append(name)
        return {"linear": 0.5, "cross_entropy": 0.95, "token_logprob": 1.6}[name]

    monkeypatch.setattr(fastest, "compare", compare)
    for _ in range(2):
        assert fastest.faster(tmp_path, torch.float32) == ["linear"]  # 0.95 is within the margin
        assert sorted(names) == sorted(fastest.NAMES)
    assert capsys.readouterr().err.count("timing the kernels beside PyTorch in float32") == 1
    assert fastest.faster(tmp_path, torch.bfloat16) == ["linear"] and len(names) == 6
    assert fastest.measured(tmp_path)["bfloat16"]["token_logprob"] == 1.6


def test_compare_runs_both_and_refuses_a_wrong_kernel(capsys):
    order = []
    same = torch.tensor([1.0, 2.0])
    ratio = fastest.compare("linear", lambda: order.append("ours") or same, lambda: order.append("theirs") or same)
    assert order == ["ours", "theirs"] * 6 and ratio > 0
    assert fastest.compare("linear", lambda: same, lambda: torch.tensor([1.0, 2.2])) == 0.0
    assert "our kernel of linear computes [1.0, 2.0] where PyTorch has [1.0, 2.2" in capsys.readouterr().err
    assert fastest.compare("linear", lambda: same * torch.nan, lambda: same) == 0.0 and fastest.loses(0.0)


@torch.no_grad()  # as an evaluation may ask first
def test_the_measured_pairs_agree_and_are_kernel_and_pytorch(monkeypatch):
    monkeypatch.setattr(fastest, "ROWS", 48)
    monkeypatch.setattr(fastest, "VOCAB", 96)
    for dtype in (torch.float32, torch.bfloat16):
        for name, (ours, theirs) in fastest.pairs(dtype).items():
            with monkeypatch.context() as patch:
                patch.setattr(reference, "linear", None)
                patch.setattr(chunked, "token_logprob", None)
                patch.setattr(chunked, "cross_entropy", None)
                a = ours()
                with pytest.raises((TypeError, AttributeError)):
                    theirs()
            torch.testing.assert_close(a, theirs(), rtol=0.02, atol=0.0, msg=name)
    assert backend.current() == Backend("ours")


def test_pick(monkeypatch):
    monkeypatch.setattr(fastest, "faster", lambda folder, dtype: ["linear"])
    assert fastest.pick("auto", torch.float32, CPU) == "none"
    with backend.using(Backend("auto")):
        assert fastest.pick("auto", torch.float32, CPU) == "linear"
    with backend.using(Backend("reference")):
        assert fastest.pick("linear", torch.float32, CPU) == "none"
    assert fastest.pick("none", torch.float32, CPU) == "none"
    assert fastest.pick("cross_entropy,linear", torch.float32, CPU) == "cross_entropy,linear"  # as a run recorded it
    assert fastest.pick("auto", torch.float32, torch.device("cuda")) == "none"
    with pytest.raises(UserError, match="'sample' is not one of cross_entropy, linear, token_logprob, auto or none"):
        fastest.pick("linear,sample", torch.float32, CPU)
