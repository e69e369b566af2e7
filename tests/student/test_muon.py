"""Muon's step is the momentum with all singular values set to about one; the other parameters take
AdamW's step."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinystory.config import PretrainConfig
from tinystory.student import checkpoint, muon
from tinystory.student.model import Student, StudentConfig
from tinystory.student.muon import MOMENTUM, MuonAdamW, orthogonalize
from tinystory.student.optim import make_optimizer

SMALL = StudentConfig(n_layer=2, n_head=2, n_embd=64, context=32, vocab_size=128)


@pytest.mark.parametrize("size", [1e-8, 1, 1e6])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 16), (2, 16, 64)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes(shape, size):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-1, 1, shape[2])
    ours = orthogonalize(size * x)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    along = (u.mT @ ours @ v.mT).diagonal(dim1=-2, dim2=-1)
    large = s > 0.02 * s[..., :1]
    assert ((along > 0.73) & (along < 1.27))[large].all()
    across = u.mT @ ours @ v.mT - torch.diag_embed(along)
    assert across.abs().max() < 1e-3


@pytest.mark.parametrize("smallest", [0.01, 0.0001])
def test_weak_directions_do_not_grow_by_rounding_to_bfloat16(smallest):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, 64, 128), full_matrices=False)
    x = u @ torch.diag(torch.logspace(0, math.log10(smallest), 64)) @ v
    exact = orthogonalize(x)
    assert (orthogonalize(x.bfloat16()) - exact).norm() < 0.3 * exact.norm()


def test_a_matrix_without_a_gradient_stays():
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 16)), torch.zeros(2, 8, 16))


def optimizer_of(matrices, vector, dtype=torch.float32):
    return MuonAdamW(
        [(f"a{i}", p) for i, p in enumerate(matrices)],
        [dict(params=[("b", vector)], weight_decay=0.0)],
        heads=2,
        dtype=dtype,
        lr=0.01,
    )


def test_a_step_is_muons_for_matrices_and_adamws_for_the_rest():
    torch.manual_seed(1)
    matrix, vector = torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(16))
    twin = torch.nn.Parameter(vector.detach().clone())
    plain, ours = (
        torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0),
        optimizer_of([matrix], vector),
    )
    momentum = torch.zeros(32, 16)
    for _ in range(3):
        grads, before = (torch.randn(32, 16), torch.randn(16)), matrix.detach().clone()
        matrix.grad, vector.grad, twin.grad = grads[0].clone(), grads[1].clone(), grads[1].clone()
        ours.step()
        plain.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * grads[0]
        step = orthogonalize((grads[0] * (1 - MOMENTUM) + MOMENTUM * momentum)[None])[0]
        torch.testing.assert_close(matrix.detach(), before - 0.01 * 2**0.5 * step)
        torch.testing.assert_close(vector, twin)


def test_each_head_has_its_own_queries_keys_values_and_projection():
    torch.manual_seed(2)
    shapes = dict(qkv=(48, 16), projection=(16, 16))
    qkv, projection = parameters = [
        torch.nn.Parameter(torch.zeros(shape)) for shape in shapes.values()
    ]
    for p in parameters:
        p.grad = torch.randn_like(p)
    # rows [queries of head 0, queries of head 1, keys of head 0, ...]; columns [head 0, head 1]
    parts = [orthogonalize(part[None])[0] for part in qkv.grad.split(8)]
    halves = [orthogonalize(part[None])[0] for part in projection.grad.split(8, dim=1)]
    optimizer_of(parameters, torch.nn.Parameter(torch.zeros(4))).step()
    torch.testing.assert_close(qkv.detach(), -0.01 * torch.cat(parts))
    torch.testing.assert_close(projection.detach(), -0.01 * torch.cat(halves, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_matmuls_are_in_the_dtype_of_the_run(dtype):
    optimizer = make_optimizer(Student(SMALL), PretrainConfig(), dtype)
    assert optimizer.dtype == dtype
    matrix = torch.nn.Parameter(torch.zeros(16, 32))
    matrix.grad = torch.randn(16, 32)
    update = matrix.grad.lerp(matrix.grad * (1 - MOMENTUM), MOMENTUM)
    direction = orthogonalize(update[None].to(dtype))[0]
    optimizer_of([matrix], torch.nn.Parameter(torch.zeros(4)), dtype).step()
    assert torch.equal(matrix.detach(), torch.zeros(16, 32).add_(direction, alpha=-0.01))


def test_large_matrices_take_the_same_step_one_by_one(monkeypatch):
    torch.manual_seed(4)
    start, grads = torch.randn(2, 3, 16, 32).unbind()
    after = []
    for limit in (16 * 32, 16 * 32 - 1):
        monkeypatch.setattr(muon, "LARGE", limit)
        parameters = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.clone()
        with FlopCounterMode(display=False) as counter:
            optimizer_of(parameters, torch.nn.Parameter(torch.zeros(4))).step()
        after.append((parameters, counter.get_total_flops()))
    torch.testing.assert_close(*after)


def test_its_state_is_saved_and_continued():
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(16))]
    copies = copy.deepcopy(parameters)
    grads = [[torch.randn(32, 16), torch.randn(16)] for _ in range(4)]

    def steps(optimizer, parameters, grads):
        for step_grads in grads:
            for p, grad in zip(parameters, step_grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()

    whole = optimizer_of(parameters[:1], parameters[1])
    steps(whole, parameters, grads)
    first = optimizer_of(copies[:1], copies[1])
    steps(first, copies, grads[:2])
    state = {k: v.clone() for k, v in checkpoint.pack_optimizer(first).items()}
    assert {"step.a0", "momentum.a0", "exp_avg.b", "exp_avg_sq.b", "step.b"} == set(state)
    second = optimizer_of(copies[:1], copies[1])
    checkpoint.unpack_optimizer(second, state)
    steps(second, copies, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
