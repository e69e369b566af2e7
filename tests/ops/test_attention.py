"""Attention kernels against the plain definition in float64: at most twice the error of PyTorch's
own kernel."""

import os
import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_largest_no_worse, assert_no_worse, on_gpu

from tinystory import ops
from tinystory.ops import reference

SHAPES = int(os.environ.get("TINYSTORY_TEST_SHAPES", "60"))  # 200 and more before a release
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtype_of(case):
    return DTYPES[case % (3 if on_gpu() else 4)]


def head_size(rng):
    return rng.choice([32, 64, 128] if on_gpu() else [16, 32, 64, 96, 128])


def random_shape(rng):
    length = rng.choice(
        [1, 2, rng.randint(3, 70), rng.randint(3, 70), rng.randint(71, 300), rng.randint(301, 1100)]
    )
    return rng.choice([1, 1, 2]), length, rng.choice([1, 2, 3]), head_size(rng)


def with_grads(attend, qkv, grad):
    qkv = qkv.detach().clone().requires_grad_()
    out = attend(qkv)
    out.backward(grad)
    return out.detach(), *qkv.grad.unbind(2)


def sdpa(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("which", range(len(DTYPES)))
def test_output_and_gradients_within_twice_pytorchs_error(which):
    errors = defaultdict(list)
    for case in range(which, SHAPES, len(DTYPES)):
        rng = random.Random(case)
        torch.manual_seed(case)
        b, t, h, d = random_shape(rng)
        dtype = dtype_of(which)
        qkv = (torch.randn(b, t, 3, h, d) * rng.choice([0.3, 1, 2])).to(dtype)
        grad = torch.randn(b, t, h, d).to(dtype)
        exact = with_grads(reference.causal_attention, qkv.double(), grad.double())
        ours, own = with_grads(ops.causal_attention, qkv, grad), with_grads(sdpa, qkv, grad)
        for name, *three in zip(("out", "dq", "dk", "dv"), ours, own, exact, strict=True):
            scale = None if name == "out" else torch.stack(exact[1:])
            errors[name].append(assert_no_worse(*three, (name, dtype, (b, t, h, d)), scale))
    assert_largest_no_worse(errors)


@pytest.mark.parametrize("case", range(len(DTYPES)))
@pytest.mark.parametrize("shape", [(2, 50, 3, 32), (1, 113, 2, 64)])
def test_dropout_forward_and_backward_draw_the_definitions_mask(case, shape):
    dtype = dtype_of(case)
    qkv, grad = torch.randn(*shape[:2], 3, *shape[2:]).to(dtype), torch.randn(shape).to(dtype)

    def attend(define):
        return lambda x: define(x, 0.3, 2**40 + 5)

    exact = with_grads(attend(reference.causal_attention), qkv.double(), grad.double())
    own = with_grads(attend(reference.causal_attention), qkv, grad)
    for three in zip(with_grads(attend(ops.causal_attention), qkv, grad), own, exact, strict=True):
        assert_no_worse(*three, dtype)


def test_dropout_keeps_the_right_share_independently():
    """Shares over 2 * 3 * 256^2 weights: 6 standard deviations is a false alarm once in 5e8
    comparisons.

    The test compares pairs of weights with random bits from the same call (8, 16, 24 apart), from
    calls that share words of the counter, and from calls of other tiles, heads, examples and seeds.
    It also counts weights by their position in the tile of 32 x 32 that 64 calls serve."""
    p, n = 0.1, 2 * 3 * 256 * 256
    mask = reference.dropout_mask(2, 3, 256, p, seed=7)
    # p is rounded to a multiple of 1/256, and kept weights are divided by the rounded probability
    true_p = 26 / 256
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - true_p)}
    mask = (mask > 0).double()
    variance = true_p * (1 - true_p)
    assert abs(mask.mean() - (1 - true_p)) < 6 * (variance / n) ** 0.5
    dropped = 1 - mask
    others = [
        dropped.roll((i, j), (2, 3))
        for i in (0, 1, 8, 16, 24, 32)
        for j in (0, 1, 8, 16, 24, 32)
        if i or j
    ]
    others += [
        dropped.roll(1, 0),
        dropped.roll(1, 1),
        (reference.dropout_mask(2, 3, 256, p, seed=8) == 0).double(),
    ]
    # the covariance of two independent weights deviates by their variance / sqrt(n)
    for other in others:
        assert abs((dropped * other).mean() - true_p**2) < 6 * variance / n**0.5
    by_place = dropped.view(6, 8, 32, 8, 32).mean((0, 1, 3))
    assert (by_place - true_p).abs().max() < 6 * (variance / (n / 1024)) ** 0.5


def test_the_highest_dropout_keeps_one_weight_in_256():
    mask = reference.dropout_mask(1, 1, 256, 0.9999, seed=3)
    assert set(mask.unique().tolist()) == {0.0, 256.0}


def test_dropout_leaves_the_mean_alone():
    """800 masks: an entry's standard deviation is at most sqrt(p / (1 - p) / 800) times the largest
    value."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 40, 3, 1, 32)
    mean = sum(ops.causal_attention(qkv, 0.2, seed) for seed in range(800)) / 800
    assert (mean - ops.causal_attention(qkv)).abs().max() < 6 * (
        0.25 / 800
    ) ** 0.5 * qkv.abs().max()


def test_gradcheck_in_float64():
    for p in (0.0, 0.4):
        qkv = torch.randn(1, 7, 3, 2, 16, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, p=p: ops.causal_attention(x, p, 3), qkv, fast_mode=True
        )


def test_opcheck():
    ops.load()
    qkv = torch.randn(1, 20, 3, 2, 32, requires_grad=True)
    for p in (0.0, 0.1):
        torch.library.opcheck(torch.ops.tinystory.causal_attention.default, (qkv, p, 3))
    new, prefix, cache = (
        torch.randn(2, 3, 2, 32),
        torch.randn(4, 2, 2, 32),
        torch.randn(2, 9, 2, 2, 32),
    )
    args = (new, prefix, torch.tensor([[0, 4], [1, 2]]), cache, torch.tensor([0, 8]))
    torch.library.opcheck(torch.ops.tinystory.decode_attention.default, args)


def test_the_same_bits_at_any_thread_count_and_batch():
    qkv, grad = torch.randn(3, 70, 3, 2, 64, requires_grad=True), torch.randn(3, 70, 2, 64)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(with_grads(ops.causal_attention, qkv, grad))
    torch.set_num_threads(threads)
    alone = [with_grads(ops.causal_attention, qkv[i : i + 1], grad[i : i + 1]) for i in range(3)]
    results.append([torch.cat(x) for x in zip(*alone, strict=True)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_scores_do_not_overflow_and_masked_values_do_not_leak():
    qkv = torch.randn(1, 60, 3, 1, 32) * 300
    exact = reference.causal_attention(qkv.double())
    assert_no_worse(ops.causal_attention(qkv), sdpa(qkv), exact, "large")
    changed = qkv.clone()
    changed[:, 40:] = 1e5
    assert torch.equal(ops.causal_attention(qkv)[:, :40], ops.causal_attention(changed)[:, :40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_of_nan_attends_to_nothing_and_changes_no_other_row(dtype):
    """Not to all keys alike, which a loss would not show."""
    qkv, step = torch.randn(1, 40, 3, 1, 32).to(dtype), torch.randn(3, 3, 1, 32).to(dtype)
    cache, lengths = torch.randn(3, 9, 2, 1, 32).to(dtype), torch.tensor([4, 6, 0])
    spans = torch.zeros(3, 2, dtype=torch.int64)

    def outputs():
        decoded = ops.decode_attention(step, cache[0, :0], spans, cache.clone(), lengths)
        return ops.causal_attention(qkv)[0], decoded

    before = outputs()
    qkv[0, 17, 0] = step[1, 0] = float("nan")
    for row, a, b in zip((17, 1), before, outputs(), strict=True):
        assert b[row].isnan().all()
        others = torch.arange(len(a)) != row
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize(
    "qkv, p, words",
    [
        (torch.zeros(1, 4, 2, 2, 32), 0.0, r"qkv must have shape \(B, T, 3, H, D\)"),
        (torch.zeros(1, 4, 3, 2, 20), 0.0, "head size D"),
        (torch.zeros(1, 4, 3, 2, 32, dtype=torch.int32), 0.0, "qkv must be float32"),
        (torch.zeros(1, 3, 4, 2, 32).transpose(1, 2), 0.0, "qkv must be contiguous"),
        (torch.zeros(1, 4, 3, 2, 32), 1.0, "dropout_p must be in"),
    ],
)
def test_errors_name_the_argument(qkv, p, words):
    with pytest.raises(RuntimeError, match=words):
        ops.causal_attention(qkv, p)


# --- decode_attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(16))
def test_decode_within_twice_pytorchs_error(case):
    rng = random.Random(case)
    torch.manual_seed(case)
    b, h, d = rng.randint(1, 6), rng.randint(1, 4), head_size(rng)
    p, t = rng.choice([0, rng.randint(1, 200)]), rng.randint(1, 200)
    dtype = dtype_of(case)
    qkv, prefix, cache = (torch.randn(*n, h, d).to(dtype) for n in ((b, 3), (p, 2), (b, t, 2)))
    lengths, spans = torch.randint(t, (b,)), torch.randint(p + 1, (b, 2)).sort(1).values
    after = cache.double()
    exact = reference.decode_attention(qkv.double(), prefix.double(), spans, after, lengths)
    k, v = (
        torch.cat([prefix.expand(b, *prefix.shape), after.to(dtype)], 1).transpose(1, 3).unbind(2)
    )
    place = torch.arange(p + t)
    mask = torch.where(
        place < p, (place >= spans[:, :1]) & (place < spans[:, 1:]), place <= p + lengths[:, None]
    )
    mask = mask[:, None, None]
    own = F.scaled_dot_product_attention(qkv[:, 0, :, None], k, v, attn_mask=mask)[:, :, 0]
    # what lies beyond a row's length is never read
    cache[torch.arange(t) >= lengths[:, None]] = float("nan")
    assert_no_worse(
        ops.decode_attention(qkv, prefix, spans, cache, lengths), own, exact, (dtype, b, h, p, t, d)
    )
    used = torch.arange(t) <= lengths[:, None]
    assert torch.equal(cache[used], after.to(dtype)[used]) and cache[~used].isnan().all()


def test_decode_errors_name_the_argument():
    qkv, prefix, cache = (
        torch.zeros(2, 3, 3, 32),
        torch.zeros(4, 2, 3, 32),
        torch.zeros(2, 5, 2, 3, 32),
    )
    for changed, words in [
        (dict(qkv=qkv[:, :2]), "qkv must have shape"),
        (dict(prefix=prefix[:, :1]), r"prefix must have shape \(P, 2, H, D\)"),
        (dict(cache=cache[:1]), r"cache must have shape \(B, T_max, 2, H, D\)"),
        (dict(cache=cache.double()), "cache is Double but qkv is Float"),
        (
            dict(cache=cache.transpose(0, 1).contiguous().transpose(0, 1)),
            "cache must be contiguous",
        ),
        (dict(spans=torch.zeros(2, 3, dtype=torch.int64)), r"spans must have shape \(B, 2\)"),
        (dict(spans=torch.tensor([[0, 4], [0, 5]])), r"spans\[1\] is 0 .. 5"),
        (dict(spans=torch.tensor([[2, 1], [0, 4]])), r"spans\[0\] is 2 .. 1"),
        (dict(spans=torch.zeros(2, 2)), "spans must be int64"),
        (dict(lengths=[1]), "lengths must have shape"),
        (dict(lengths=[1, 5]), r"lengths\[1\] is 5"),
        (dict(lengths=[-1, 0]), r"lengths\[0\] is -1"),
    ]:
        args = (
            dict(
                qkv=qkv,
                prefix=prefix,
                spans=torch.tensor([[0, 4]] * 2),
                cache=cache,
                lengths=[0, 4],
            )
            | changed
        )
        with pytest.raises(RuntimeError, match=words):
            ops.decode_attention(**args | dict(lengths=torch.tensor(args["lengths"])))
