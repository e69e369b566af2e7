"""ops.linear and ops.layer_norm: as exact as PyTorch, gradients too; a row's bits depend on that row alone."""

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
    return [t.requires_grad_() for t in (x, weight, bias, torch.randn(rows, n))], torch.randn(rows, n)


def run(f, leaves, grad, dtype):
    """The outcome and the gradients of f under autocast to dtype; in float64 as they are."""
    leaves = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = f(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach()] + [t.grad for t in leaves if t.grad is not None]


def error(found, true):
    """Root mean square: the largest error alone would be luck."""
    return [float((a.double() - b).pow(2).mean().sqrt()) for a, b in zip(found, true, strict=True)]


def close(ours, plain, leaves, grad, dtype):
    true = run(plain, leaves, grad, torch.float64)
    ours, theirs = error(run(ours, leaves, grad, dtype), true), error(run(plain, leaves, grad, dtype), true)
    sizes = [float(t.pow(2).mean().sqrt()) for t in true]
    for mine, their, size in zip(ours, theirs, sizes, strict=True):
        assert mine <= 2 * their + 1e-7 * size, (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_as_close_to_the_truth_as_pytorch(shape, residual, gelu, dtype):
    leaves, grad = inputs(*shape)

    def ours(x, w, b, r):
        return ops.linear(x, w, b, gelu=gelu, residual=r if residual else None)

    close(ours, lambda x, w, b, r: reference.linear(x, w, b, r if residual else None, gelu), leaves, grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 32), (65, 96), (300, 256)])
def test_layer_norm_is_as_close_to_the_truth_as_pytorch(rows, size, dtype):
    torch.manual_seed(0)
    leaves, grad = [torch.randn(rows, size) * 3 + 1, torch.randn(size), torch.randn(size)], torch.randn(rows, size)

    def plain(x, w, b):  # rounded to the type of the matmul that reads it
        return reference.layer_norm(x, w, b).to(torch.promote_types(x.dtype, dtype) if x.dtype.itemsize > 4 else dtype)

    close(ops.layer_norm, plain, leaves, grad, dtype)


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
    (x, w, b, r), grad = inputs(300, 96, 160)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(lambda x, w, b, r: ops.linear(x, w, b, gelu=True, residual=r), [x, w, b, r], grad, dtype)
        torch.set_num_threads(3)
        again = run(lambda x, w, b, r: ops.linear(x, w, b, gelu=True, residual=r), [x, w, b, r], grad, dtype)
        part = run(
            lambda x, w, b, r: ops.linear(x, w, b, gelu=True, residual=r), [x[7:20], w, b, r[7:20]], grad[7:20], dtype
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
    assert torch.equal(whole[0][7:20], part[0])
    assert torch.equal(whole[1][7:20], part[1])


def test_what_the_kernel_does_not_fit_runs_in_pytorch():
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 20), torch.randn(7, 20), torch.randn(7)
    assert torch.equal(ops.linear(x, w, b, gelu=True), reference.linear(x, w, b, None, True))
    assert ops.linear(x.double(), w.double(), b.double()).dtype == torch.float64


def test_reference_gradients():
    torch.manual_seed(0)
    x, w, b, r = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,), (3, 5)))
    assert torch.autograd.gradcheck(lambda *t: reference.linear(*t, gelu=True), (x, w, b, r))
    assert torch.autograd.gradcheck(reference.layer_norm, (x, w[0], w[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    (x, w, b, r), _ = inputs(9, 32, 64)
    for residual, gelu in ((None, True), (r, False)):
        torch.library.opcheck(torch.ops.tinystory.linear, (x, w, b, residual, gelu, dtype))
    torch.library.opcheck(torch.ops.tinystory.layer_norm, (r, b, b, dtype))


def test_the_student_compiles_whole():
    torch.manual_seed(0)
    student = Student(StudentConfig(n_layer=1, n_head=2, n_embd=32, context=8, vocab_size=16))
    tokens = torch.randint(16, (2, 8))
    compiled = torch.compile(student.hidden, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), student.hidden(tokens))


def test_errors_say_what_does_not_fit():
    (x, w, b, r), _ = inputs(9, 32, 64)
    run = torch.ops.tinystory.linear
    with pytest.raises(RuntimeError, match="multiples of 32"):
        run(x[:, :31].contiguous(), w[:, :31].contiguous(), b, None, False, torch.float32)
    with pytest.raises(RuntimeError, match="do not fit"):
        run(r, w, b, None, False, torch.float32)
    with pytest.raises(RuntimeError, match="residual must be contiguous float32 of shape"):
        run(x, w, b, x, False, torch.float32)
    with pytest.raises(RuntimeError, match="linear: dtype must be float32 or bfloat16, not Half"):
        run(x, w, b, None, False, torch.float16)
    with pytest.raises(RuntimeError, match="layer_norm: dtype must be"):
        torch.ops.tinystory.layer_norm(r, b, b, torch.float16)
