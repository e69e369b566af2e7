"""Muon's step is momentum with its singular values set to one; everything else is AdamW's own."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinystory.config import PretrainConfig
from tinystory.student import checkpoint
from tinystory.student.model import Student, StudentConfig
from tinystory.student.muon import MOMENTUM, MuonAdamW, orthogonalize
from tinystory.student.optim import costly_muon, make_optimizer


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 16), (2, 16, 64)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes(shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-1, 1, shape[2])
    ours = orthogonalize(x)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    along = (u.mT @ ours @ v.mT).diagonal(dim1=-2, dim2=-1)
    large = s > 0.05 * s[..., :1]
    assert ((along > 0.6) & (along < 1.3))[large].all()
    across = u.mT @ ours @ v.mT - torch.diag_embed(along)
    assert across.abs().max() < 1e-3


def optimizer_of(matrix, vector, **how):
    return MuonAdamW([matrix], [dict(params=[vector], weight_decay=0.0)], lr=0.01, **how)


def test_a_step_is_muons_for_matrices_and_adamws_for_the_rest():
    torch.manual_seed(1)
    matrix, vector = torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(16))
    twin = torch.nn.Parameter(vector.detach().clone())
    plain, ours = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0), optimizer_of(matrix, vector)
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


def test_queries_keys_and_values_are_three_matrices():
    torch.manual_seed(2)
    qkv, vector = torch.nn.Parameter(torch.zeros(48, 16)), torch.nn.Parameter(torch.zeros(4))
    qkv.grad = torch.randn(48, 16)
    parts = orthogonalize((qkv.grad * (1 - MOMENTUM**2)).view(3, 16, 16))
    optimizer_of(qkv, vector).step()
    torch.testing.assert_close(qkv.detach(), -0.01 * parts.view(48, 16), atol=1e-4, rtol=1e-3)


def test_the_flops_of_a_step_are_those_it_computes():
    qkv, fc, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (64, 16), (16,)))
    optimizer = MuonAdamW([qkv, fc], [dict(params=[vector], weight_decay=0.0)], lr=0.01)
    for p in (qkv, fc, vector):
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    square, tall = 5 * 3 * 2 * 16**3, 2 * 2 * 16 * 16 * 64 + 17 * 2 * 16**3
    assert optimizer.flops() == counter.get_total_flops() == 3 * square + tall


def test_pretraining_says_when_muon_takes_a_large_part_of_a_step():
    student = Student(StudentConfig(n_layer=2, n_head=2, n_embd=64, context=32, vocab_size=128))

    def warning(optimizer, batch_size):
        trained_by, _ = make_optimizer(student, PretrainConfig(optimizer=optimizer))
        return costly_muon(student, trained_by, batch_size)

    # Per layer four square matrices of 30 n^3 operations and two of 50 n^3; the student's are 6 per weight and token.
    share = 2 * 220 * 64**3 / (6 * (2 * 12 * 64**2 + 128 * 64) * 4 * 32)
    assert f"With 128 tokens per step, Muon's matmuls come to {share:.1f} times" in warning("muon", 4)
    assert warning("muon", 64) == warning("adamw", 4) == ""


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

    whole = optimizer_of(*parameters)
    steps(whole, parameters, grads)
    first = optimizer_of(*copies)
    steps(first, copies, grads[:2])
    state = {k: v.clone() for k, v in checkpoint.pack_optimizer(first, ["a", "b"]).items()}
    assert {"step.a", "momentum.a", "exp_avg.b", "exp_avg_sq.b", "step.b"} == set(state)
    second = optimizer_of(*copies)
    checkpoint.unpack_optimizer(second, ["a", "b"], state)
    steps(second, copies, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
