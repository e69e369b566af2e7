"""token_logprob and cross_entropy against the plain definition in float64: at most twice PyTorch's
own error."""

import os
import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_largest_no_worse, assert_no_worse, on_gpu

from tinystory import ops
from tinystory.ops import fake, reference

SHAPES = int(os.environ.get("TINYSTORY_TEST_SHAPES", "60"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def problem(case):
    rng = random.Random(case)
    torch.manual_seed(case)
    n, c, v = (
        rng.randint(30, 150),
        rng.choice([8, 16, 33, 64, 256]),
        rng.choice([17, 64, rng.randint(20, 3000)]),
    )
    dtype = DTYPES[case % (3 if on_gpu() else 4)]
    hidden, weight = (
        torch.randn(n, c).to(dtype),
        (torch.randn(v, c) * rng.choice([0.1, 0.5])).to(dtype),
    )
    return hidden, weight, torch.randint(v, (n,))


def results(f, hidden, weight, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    outputs, loss = f(*leaves)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, leaves))


def compare(errors, ours, theirs, hidden, weight):
    exact = results(theirs, hidden, weight, torch.float64)
    pairs = zip(
        results(ours, hidden, weight, hidden.dtype),
        results(theirs, hidden, weight, hidden.dtype),
        strict=True,
    )
    for i, (x, y) in enumerate(pairs):
        note = f"result {i} of {hidden.dtype}, {tuple(hidden.shape)} and {tuple(weight.shape)}"
        errors[f"result {i}"].append(assert_no_worse(x, y, exact[i], note))
    return exact


@pytest.mark.parametrize("which", range(len(DTYPES)))
def test_values_and_gradients_of_both_outputs(which):
    errors = defaultdict(list)
    for case in range(which, SHAPES, len(DTYPES)):
        hidden, weight, targets = problem(case)
        g, ge = torch.randn(2, len(hidden), dtype=torch.float64) * torch.tensor([[1.0], [case % 3]])

        def through(op, targets=targets, g=g, ge=ge):
            def f(h, w):
                logprob, entropy = op(h, w, targets)
                return (logprob, entropy), (logprob * g + entropy * ge).sum()

            return f

        compare(
            errors, through(ops.token_logprob), through(reference.token_logprob), hidden, weight
        )
    assert_largest_no_worse(errors)


@pytest.mark.parametrize("which", range(len(DTYPES)))
def test_cross_entropy(which):
    errors = defaultdict(list)
    for case in range(which, SHAPES, len(DTYPES)):
        hidden, weight, targets = problem(case)

        def ours(h, w, targets=targets):
            loss = ops.cross_entropy(h, w, targets)
            return (loss,), 3 * loss

        def theirs(h, w, targets=targets):
            loss = F.cross_entropy(
                (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), targets
            )
            return (loss,), 3 * loss

        exact = compare(errors, ours, theirs, hidden, weight)
        with torch.no_grad():
            loss = ops.cross_entropy(hidden, weight, targets).double()
            torch.testing.assert_close(loss, exact[0], atol=2e-2, rtol=1e-2)
    assert_largest_no_worse(errors)


def test_a_scaled_float16_loss_keeps_its_gradients():
    """Without the scale, most gradients with respect to logits, below 1 / N, are no float16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 8).half(), torch.randn(900, 8).half()
    targets = torch.randint(900, (4096,))

    def through(cross_entropy):
        def f(h, w):
            loss = 4096 * cross_entropy(h, w)
            return (loss,), loss

        return f

    ours = through(lambda h, w: ops.cross_entropy(h, w, targets))
    theirs = through(lambda h, w: F.cross_entropy(h @ w.T, targets))
    exact = results(theirs, hidden, weight, torch.float64)
    for x, e in zip(results(ours, hidden, weight, torch.float16), exact, strict=True):
        assert (x - e).norm() < 1e-3 * e.norm()


@pytest.mark.parametrize(
    "n, c, v", [(1, 1, 1), (1, 7, 2), (3, 64, 2), (2, 100, 257), (1500, 8, 9000)]
)
def test_degenerate_sizes_and_several_chunks(n, c, v):
    hidden, weight, targets = torch.randn(n, c), torch.randn(v, c), torch.randint(v, (n,))
    g = torch.randn(2, n)

    def through(op):
        def f(h, w):
            two = op(h, w, targets)
            return two, (two[0] * g[0] + two[1] * g[1]).sum()

        return f

    exact = results(through(reference.token_logprob), hidden, weight, torch.float64)
    for ours, e in zip(
        results(through(ops.token_logprob), hidden, weight, torch.float32), exact, strict=True
    ):
        assert (ours - e).abs().max() < 2e-5 * max(1, float(e.abs().max()))


def test_gradcheck_in_float64():
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6,))
    assert torch.autograd.gradcheck(lambda h, w: ops.token_logprob(h, w, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: ops.cross_entropy(h, w, targets), (hidden, weight))


def test_autocast_multiplies_in_bfloat16_and_keeps_the_weight_gradient_wide():
    hidden, weight = (
        torch.randn(20, 32, requires_grad=True),
        torch.randn(50, 32, requires_grad=True),
    )
    targets = torch.randint(50, (20,))
    for op in (lambda *a: -ops.token_logprob(*a)[0].mean(), ops.cross_entropy):
        with torch.autocast(hidden.device.type, torch.bfloat16):
            loss = op(hidden, weight, targets)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
        rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
        want = F.cross_entropy(rounded[0] @ rounded[1].T, targets)
        torch.testing.assert_close(loss, want, atol=0.05, rtol=0.02)
        for x, y in zip(grads, torch.autograd.grad(want, rounded), strict=True):
            assert (x - y).norm() < 0.02 * y.norm()


def test_the_same_bits_at_any_thread_count():
    hidden, weight = (
        torch.randn(50, 32, requires_grad=True),
        torch.randn(300, 32, requires_grad=True),
    )
    targets, threads, seen = torch.randint(300, (50,)), torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        logprob, entropy = ops.token_logprob(hidden, weight, targets)
        seen.append(
            (logprob, entropy, *torch.autograd.grad((logprob + entropy).sum(), (hidden, weight)))
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_kept_logits_change_no_bit_and_are_kept_within_their_limit(monkeypatch):
    hidden, weight = (
        torch.randn(50, 32, requires_grad=True),
        torch.randn(700, 32, requires_grad=True),
    )
    targets, seen = torch.randint(700, (50,)), []
    group = 50 * fake.LOGIT_STRIDE * 4
    for limit, groups in ((0, 0), (2 * group, 2), (9 * group, 3)):
        monkeypatch.setattr(ops, "KEPT_BYTES", limit)
        assert ops.kept_groups(hidden, weight) == groups
        logprob, entropy = ops.token_logprob(hidden, weight, targets)
        # before the first one's backward pass
        other, _ = ops.token_logprob(hidden * 2, weight, targets)
        results = torch.autograd.grad(
            (logprob + entropy + other).sum(), (hidden, weight), retain_graph=True
        )
        again = torch.autograd.grad((logprob + entropy + other).sum(), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
        seen.append((logprob, entropy, other, *results))
    assert all(torch.equal(a, b) for some in seen[1:] for a, b in zip(seen[0], some, strict=True))
    with torch.no_grad():
        assert ops.kept_groups(hidden, weight) == 0
    assert ops.kept_groups(hidden.bfloat16(), weight) == ops.kept_groups(hidden[:0], weight) == 0


def test_opcheck_and_compile():
    ops.load()
    hidden, weight = (
        torch.randn(20, 16, requires_grad=True),
        torch.randn(50, 16, requires_grad=True),
    )
    targets = torch.randint(50, (20,))
    torch.library.opcheck(torch.ops.tinystory.cross_entropy.default, (hidden, weight, targets))
    op = torch.ops.tinystory.token_logprob.default
    torch.library.opcheck(op, (hidden, weight, targets, 0))
    # the other compares memory never written
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (hidden, weight, targets, 1), test_utils=utils)

    def step(qkv, hidden, seed):
        mixed = ops.causal_attention(qkv * 1.5, 0.1, seed).sum() + ops.cross_entropy(
            hidden * 2, weight, targets
        )
        return mixed + ops.token_logprob(hidden * 2, weight, targets)[1].sum()

    qkv = torch.randn(1, 9, 3, 1, 32, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        a, b = (
            torch.autograd.grad(f(qkv, hidden, seed), (qkv, hidden, weight))
            for f in (step, compiled)
        )
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def test_errors_name_the_argument():
    h, w, t = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 1, 2, 9])
    for args, words in [
        ((h[0], w, t), "hidden must have shape"),
        ((h, w[:, :7], t), "weight must have shape"),
        ((h, w, t[:3]), "targets must have shape"),
        ((h, w, t.int()), "targets must be int64"),
        ((h, w, t + 1), r"targets\[3\] is 10"),
        ((h, w, t - 1), r"targets\[0\] is -1"),
        ((h.int(), w, t), "hidden must be float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            ops.token_logprob(*args)


def test_a_whole_group_of_columns_at_minus_infinity_weighs_nothing():
    hidden, targets = torch.full((6, 8), 1e200, dtype=torch.float64), torch.randint(200, (6,))
    weight = torch.randn(700, 8, dtype=torch.float64) * 1e-200
    weight[256:512] = -1e200
    left = torch.cat([weight[:256], weight[512:]])
    for ours, want in zip(
        ops.token_logprob(hidden, weight, targets),
        ops.token_logprob(hidden, left, targets),
        strict=True,
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, want)
