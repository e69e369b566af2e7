"""ops.linear and ops.add_layer_norm: as exact as PyTorch, gradients too; a row's bits depend on
that row alone."""

import functools
import platform

import pytest
import torch
import torch.nn.functional as F

from tinystory import ops
from tinystory.ops import reference
from tinystory.student.model import Student, StudentConfig

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1, 32, 32), (7, 96, 32), (49, 64, 160), (130, 256, 96), (2051, 32, 64)]  # rows, in, out


def inputs(rows, k, n, seed=0):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    return [t.requires_grad_() for t in (x, weight, bias)], torch.randn(rows, n)


def run(f, leaves, grad, dtype):
    """The outcome and the gradients of f under autocast to dtype; in float64 as they are."""
    leaves = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = f(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach()] + [t.grad for t in leaves if t.grad is not None]


def error(outputs, true):
    """Root mean square, because the largest error varies by chance."""
    return [
        float((a.double() - b).pow(2).mean().sqrt()) for a, b in zip(outputs, true, strict=True)
    ]


def close(ours, plain, leaves, grad, dtype):
    true = run(plain, leaves, grad, torch.float64)
    ours, theirs = (
        error(run(ours, leaves, grad, dtype), true),
        error(run(plain, leaves, grad, dtype), true),
    )
    sizes = [float(t.pow(2).mean().sqrt()) for t in true]
    for own, their, size in zip(ours, theirs, sizes, strict=True):
        assert own <= 2 * their + 1e-7 * size, (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_as_close_to_the_truth_as_pytorch(shape, wide, gelu, dtype):
    leaves, grad = inputs(*shape)
    ours = functools.partial(ops.linear, gelu=gelu, wide=wide)
    close(ours, functools.partial(reference.linear, gelu=gelu), leaves, grad, dtype)
    assert run(ours, leaves, grad, dtype)[0].dtype == (torch.float32 if wide else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", (0.0, 0.25))
@pytest.mark.parametrize("branch_type", (None, *DTYPES))
@pytest.mark.parametrize("rows, size", [(1, 32), (65, 96), (300, 256)])
def test_the_sum_and_its_norm_are_as_close_to_the_truth_as_pytorchs(
    rows, size, branch_type, dropout, dtype
):
    torch.manual_seed(0)
    leaves = [torch.randn(rows, size) * 3 + 1, torch.randn(size), torch.randn(size)]
    leaves += [] if branch_type is None else [torch.randn(rows, size).to(branch_type)]

    def stacked(f, x, w, b, branch=None):
        return torch.stack([out.to(x.dtype) for out in f(x, branch, w, b, dropout, 3)])

    def defined(x, *arguments):
        return reference.add_layer_norm(x, *arguments, ops.matmul_dtype(x))

    ours, plain = (
        functools.partial(stacked, ops.add_layer_norm),
        functools.partial(stacked, defined),
    )
    close(ours, plain, leaves, torch.randn(2, rows, size), dtype)


def test_dropout_of_branches_is_drawn_from_the_seed():
    mask = reference.branch_mask(torch.empty(200, 512), 0.25, 3)
    x, one = torch.zeros(200, 512), torch.ones(200, 512)
    assert torch.equal(ops.add_layer_norm(x, one, one[0], one[0], 0.25, 3)[0], mask)
    assert mask.unique().tolist() == [0.0, torch.tensor(256 / 192).item()]
    assert abs(mask.mean() - 1) < 0.01 and not torch.equal(
        mask, reference.branch_mask(mask, 0.25, 4)
    )
    neighbours = torch.stack(
        [mask[:-1, :-1], mask[1:, :-1], mask[:-1, 1:], mask[:-1, :-1].roll(128, 1)]
    ).flatten(1)
    # 100 000 pairs: 0.003 is one standard deviation
    assert (neighbours.corrcoef() - torch.eye(4)).abs().max() < 0.02


def test_bf16_input_without_a_cast():
    leaves, grad = inputs(50, 64, 96)
    x = leaves[0].detach().bfloat16().requires_grad_()
    y = ops.linear(x, *leaves[1:3])
    y.backward(grad.bfloat16())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert leaves[1].grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), F.linear(x.float(), *leaves[1:3]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_batch_nor_the_threads_change_a_row(dtype):
    (x, w, b), grad = inputs(300, 96, 160)
    threads, gelu = torch.get_num_threads(), functools.partial(ops.linear, gelu=True)
    try:
        torch.set_num_threads(1)
        whole = run(gelu, [x, w, b], grad, dtype)
        torch.set_num_threads(3)
        again = run(gelu, [x, w, b], grad, dtype)
        part = run(gelu, [x[7:20], w, b], grad[7:20], dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
    assert torch.equal(whole[0][7:20], part[0])
    assert torch.equal(whole[1][7:20], part[1])


def test_what_the_kernel_does_not_fit_runs_in_pytorch():
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 20), torch.randn(7, 20), torch.randn(7)
    assert torch.equal(ops.linear(x, w, b, gelu=True), reference.linear(x, w, b, True))
    assert ops.linear(x.double(), w.double(), b.double()).dtype == torch.float64
    total, y = ops.add_layer_norm(x, x, w[0], w[1])
    assert torch.equal(total, x + x) and torch.equal(y, F.layer_norm(x + x, (20,), w[0], w[1]))


def test_what_the_kernel_does_not_fit_may_be_16_bit_or_empty():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 48).bfloat16(), torch.randn(48, 48), torch.randn(48)
    torch.testing.assert_close(
        ops.linear(x, w, b).float(), F.linear(x.float(), w, b), rtol=0.02, atol=0.1
    )
    assert torch.equal(ops.linear(torch.randn(3, 0), torch.randn(48, 0), b), b.expand(3, 48))
    none = torch.randn(0, 32, requires_grad=True)
    ops.linear(torch.randn(3, 32), none, torch.randn(0)).sum().backward()
    assert none.grad.shape == (0, 32)
    with pytest.raises(RuntimeError, match="hidden has no columns"):
        ops.token_logprob(torch.randn(3, 0), torch.randn(5, 0), torch.zeros(3, dtype=torch.long))


def test_reference_gradients():
    torch.manual_seed(0)
    x, w, b, r = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 4), (5, 4), (5,), (3, 4))
    )
    assert torch.autograd.gradcheck(lambda *t: reference.linear(*t, gelu=True), (x, w, b))
    for branch in (None, r):
        run = functools.partial(
            reference.add_layer_norm, dropout_p=0.25, seed=3, dtype=torch.float64
        )
        assert torch.autograd.gradcheck(run, (x, branch, w[0], w[1]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only kernels for x86 flush subnormals")
def test_subnormals_are_zero_in_kernels_and_nowhere_else():
    tiny, ones, zeros = torch.full((64, 32), 1e-39), torch.ones(32, 32), torch.zeros(32)
    y, _ = torch.ops.tinystory.linear(tiny, ones, zeros, False, torch.float32, torch.float32)
    assert not y.any()
    assert (tiny * 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    (x, w, b), y = inputs(9, 32, 64)
    for gelu, out_dtype in ((True, dtype), (False, torch.float32)):
        torch.library.opcheck(torch.ops.tinystory.linear, (x, w, b, gelu, dtype, out_dtype))
    for branch in (None, y.to(dtype).requires_grad_()):
        stream = torch.randn(9, 64, requires_grad=True)
        torch.library.opcheck(
            torch.ops.tinystory.add_layer_norm, (stream, branch, b, b, 0.25, 3, dtype)
        )


def test_the_student_compiles_whole():
    torch.manual_seed(0)
    student = Student(StudentConfig(n_layer=1, n_head=2, n_embd=32, context=8, vocab_size=16))
    tokens = torch.randint(16, (2, 8))
    compiled = torch.compile(student.hidden, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), student.hidden(tokens))


def test_errors_say_what_does_not_fit():
    (x, w, b), r = inputs(9, 32, 64)
    run = torch.ops.tinystory.linear
    with pytest.raises(RuntimeError, match="multiples of 32"):
        run(x[:, :31].contiguous(), w[:, :31].contiguous(), b, False, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="do not fit"):
        run(r, w, b, False, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="linear: dtype must be float32 or bfloat16, not Half"):
        run(x, w, b, False, torch.float16, torch.float32)
    norm = torch.ops.tinystory.add_layer_norm
    with pytest.raises(
        RuntimeError, match="add_layer_norm: y must be float32, bfloat16 or float16, not Double"
    ):
        norm(r, None, b, b, 0.0, 0, torch.float64)
    with pytest.raises(RuntimeError, match="branch must be like x"):
        norm(r, x, b, b, 0.0, 0, torch.float32)
    with pytest.raises(RuntimeError, match=r"dropout_p must be in \[0, 1\), not 1"):
        norm(r, r, b, b, 1.0, 0, torch.float32)
