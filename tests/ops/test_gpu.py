"""The CUDA kernels on a GPU. Most of these are the CPU tests, run on CUDA tensors.

pytest -m gpu
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, SMALL, assert_no_worse, metrics
from test_attention import (  # noqa: F401
    test_a_query_of_nan_attends_to_nothing_and_changes_no_other_row,
    test_decode_within_twice_pytorchs_error,
    test_dropout_forward_and_backward_draw_the_definitions_mask,
    test_dropout_leaves_the_mean_alone,
    test_large_scores_do_not_overflow_and_masked_values_do_not_leak,
    test_opcheck,
    test_output_and_gradients_within_twice_pytorchs_error,
)
from test_logprob import (  # noqa: F401
    test_autocast_multiplies_in_bfloat16_and_keeps_the_weight_gradient_wide,
    test_cross_entropy,
    test_degenerate_sizes_and_several_chunks,
    test_opcheck_and_compile,
    test_values_and_gradients_of_both_outputs,
)
from test_sample import (  # noqa: F401
    test_a_large_vocabulary,
    test_frequencies_are_the_probabilities,
    test_the_draw_depends_on_nothing_but_seed_row_step_and_logits,
    test_the_kernel_draws_what_the_definition_draws,
    test_top_k_and_top_p_sets_are_exact,
)
from test_sample import test_opcheck as test_opcheck_of_sample  # noqa: F401
from test_student import test_reading_and_writing_agree  # noqa: F401

import train_interact as interact
import train_pretrain as pretrain
from tinystory import ops
from tinystory.ops import cuda
from tinystory.student.generate import generate
from tinystory.student.model import ValueHead
from tinystory.student.token_step import TokenStep

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip(
        "no CUDA device: the CUDA kernels are not run on a GPU here", allow_module_level=True
    )


@pytest.fixture(autouse=True)
def on_the_gpu(request):
    if "opcheck" in request.node.name:  # which calls operators directly
        for dtype in cuda.DTYPES:
            for head_size in cuda.HEAD_SIZES:
                cuda.load_attention(dtype, head_size)
    with torch.device("cuda"):
        yield


# --- one launch of each kernel, which `make gpu-day` runs before the speeds --------------------------
def lowered_linear(x, w, b):
    if not x.is_cuda:
        return F.gelu(F.linear(x, w, b), approximate="tanh")
    return ops.lowered_linear(x, w, b, (w.detach().bfloat16(), b.detach().bfloat16()), True).float()


def launches(dtype):
    """Every operator as a function of tensors, and such tensors on the CPU, those of floats in the
    operator's dtypes. Heads have the presets' size."""
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(shape).to(dtype)

    qkv = randn(2, 200, 3, 2, 64)
    token = [randn(5, 3, 2, 64), randn(9, 2, 2, 64), randn(5, 12, 2, 2, 64)]
    token += [torch.tensor([[0, 7], [0, 7], [2, 9], [4, 4], [1, 9]]), torch.tensor([3, 0, 8, 1, 5])]
    vocabulary = [randn(70, 64), randn(1000, 64) / 8, torch.randint(1000, (70,))]
    norm = [torch.randn(70, 256), randn(70, 256), torch.randn(256), torch.randn(256)]
    logits, draw = [randn(5, 3000), torch.arange(5)], dict(seed=1, step=2)
    return {
        "causal_attention": (ops.causal_attention, [qkv]),
        "causal_attention, dropout": (lambda x: ops.causal_attention(x, 0.1, 3), [qkv]),
        "decode_attention": (
            lambda new, prefix, cache, *rest: ops.decode_attention(
                new, prefix, rest[0], cache.detach(), rest[1]
            ),
            token,
        ),
        "token_logprob": (ops.token_logprob, vocabulary),
        "cross_entropy": (ops.cross_entropy, vocabulary),
        "add_layer_norm": (
            lambda *x: torch.ops.tinystory.add_layer_norm(*x, 0.1, 3, dtype)[:2],
            norm,
        ),
        "sample": (lambda x, rows: ops.sample(x, rows=rows, **draw), logits),
        "sample, cuts": (
            lambda x, rows: ops.sample(x, rows=rows, top_k=40, top_p=0.9, **draw),
            logits,
        ),
        "lowered_linear": (
            lowered_linear,
            [torch.randn(70, 64), torch.randn(256, 64) / 8, torch.randn(256)],
        ),
    }


def outputs_and_gradients(operator, inputs, device):
    leaves = [x.detach().to(device) for x in inputs]
    learned = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    outputs = operator(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    gradients = []
    if any(x.requires_grad for x in outputs):
        gradients = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), learned)
    return [x.detach().cpu().double() for x in [*outputs, *gradients]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", launches(torch.float32))
def test_a_launch_of_each_kernel_gives_what_the_cpu_gives(name, dtype):
    with torch.device("cpu"):
        operator, inputs = launches(dtype)[name]
        here = outputs_and_gradients(operator, inputs, "cpu")
        there = outputs_and_gradients(operator, inputs, "cuda")
    bound = 1e-4 if dtype == torch.float32 and name != "lowered_linear" else 0.02
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        assert float((b - a).norm() / a.norm()) < bound, f"result {i}"


# --- everything -------------------------------------------------------------------------------------
def problems():
    """Every op with inputs large enough for many blocks: name -> (function of a leaf tensor, that
    tensor)."""
    torch.manual_seed(0)
    weight, targets, rows = torch.randn(5000, 64), torch.randint(5000, (3000,)), torch.arange(300)
    prefix, cache, lengths = (
        torch.randn(40, 2, 8, 64),
        torch.randn(300, 90, 2, 8, 64),
        torch.randint(90, (300,)),
    )
    spans = torch.randint(41, (300, 2)).sort(1).values
    gain, shift = torch.randn(2, 768)
    return {
        "causal_attention": (
            lambda x: ops.causal_attention(x, 0.1, 5),
            torch.randn(4, 300, 3, 8, 64),
        ),
        "token_logprob": (
            lambda x: sum(ops.token_logprob(x, weight, targets)),
            torch.randn(3000, 64),
        ),
        "cross_entropy": (lambda x: ops.cross_entropy(x, weight, targets), torch.randn(3000, 64)),
        "decode_attention": (
            lambda x: ops.decode_attention(x, prefix, spans, cache.clone(), lengths),
            torch.randn(300, 3, 8, 64),
        ),
        "add_layer_norm": (
            lambda x: torch.cat(ops.add_layer_norm(x, x, gain, shift, dropout_p=0.1, seed=3)),
            torch.randn(3000, 768),
        ),
        "sample": (
            lambda x: ops.sample(x, seed=1, rows=rows, step=2, top_p=0.9)[1],
            torch.randn(300, 20_000),
        ),
    }


NAMES = ["causal_attention", "token_logprob", "cross_entropy", "decode_attention", "sample"]
NAMES += ["add_layer_norm"]


def run(f, x):
    """The output, and the gradient of the output's sum if the op has one."""
    x = x.clone().requires_grad_()
    out = f(x)
    return [out.detach(), *(torch.autograd.grad(out.sum(), x) if out.requires_grad else ())]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_every_run(name):
    f, x = problems()[name]
    first = run(f, x)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(f, x), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_is_not_the_default_one(name):
    """The op must run after earlier work on the same stream: here a pause, then a copy of the real
    input."""
    f, x = problems()[name]
    want, stream, late = run(f, x), torch.cuda.Stream(), torch.full_like(x, 0.25)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = run(f, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: the device guard is not tested")
    f, x = problems()[name]
    want = run(f, x)
    with torch.device("cuda:1"):
        torch.manual_seed(0)
        f, x = problems()[name]
        got = run(f, x)
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in got)
    assert [t.shape for t in got] == [t.shape for t in want] and all(
        t.isfinite().all() for t in got
    )


@pytest.mark.parametrize("types", ["float32 float32", "bfloat16 float32", "float16 float16"])
def test_the_sum_and_its_norm_are_the_definitions(types):
    branch_type, dtype = (getattr(torch, name) for name in types.split())
    leaves = [
        torch.randn(77, 800),
        torch.randn(77, 800).to(branch_type),
        torch.randn(800),
        torch.randn(800),
    ]
    grads = torch.randn(77, 800), torch.randn(77, 800).to(dtype)

    def run(f):
        inputs = [x.clone().requires_grad_() for x in leaves]
        outputs = f(*inputs, 0.25, 7, dtype)[:2]
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    for a, b in zip(
        run(torch.ops.tinystory.add_layer_norm), run(ops.reference.add_layer_norm), strict=True
    ):
        bound = 1e-4 if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)
    torch.library.opcheck(torch.ops.tinystory.add_layer_norm.default, (*leaves, 0.25, 7, dtype))


def test_with_copies_of_weights_gradients_are_as_exact_as_autocasts(request):
    with torch.device("cpu"):
        student = request.getfixturevalue("student").to("cuda")
    tokens = torch.randint(student.config.vocab_size, (3, 33))

    def gradients(dtype, copies):
        student.zero_grad()
        with student.lowered(torch.bfloat16 if copies else student.wte.weight.dtype):
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = student.hidden(tokens[:, :-1]).flatten(0, 1)
                loss = ops.cross_entropy(hidden, student.unembedding, tokens[:, 1:].flatten())
            loss.backward()
        return [loss.detach(), *(p.grad for p in student.parameters())]

    exact, cast = gradients(torch.float32, False), gradients(torch.bfloat16, False)
    for i, (a, b, c) in enumerate(zip(gradients(torch.bfloat16, True), cast, exact, strict=True)):
        assert_no_worse(a, b, c.double(), f"result {i}")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_draw_is_the_same_on_the_cpu_and_on_the_gpu(options, dtype):
    logits, rows, steps = (
        (torch.randn(500, 16_000) * 3).to(dtype),
        torch.randperm(10_000)[:500],
        torch.arange(500),
    )
    here = ops.sample(logits, seed=11, rows=rows, step=steps, **options)
    there = ops.sample(logits.cpu(), seed=11, rows=rows.cpu(), step=steps.cpu(), **options)
    assert torch.equal(here[0].cpu(), there[0])
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=2e-5, rtol=1e-5)


def test_a_row_that_cannot_be_drawn_from_is_named_when_tokens_are_read():
    for value, words in (
        (float("nan"), "NaN or"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf throughout"),
    ):
        logits, rows = torch.randn(3, 40), torch.tensor([7, 8, 9])
        logits[1] = value
        tokens = ops.sample(logits, seed=0, rows=rows, step=0)[0]
        assert (tokens[[0, 2]] >= 0).all()
        with pytest.raises(RuntimeError, match=f"logits row 1 .id 8. .*{words}"):
            ops.require_drawn(tokens, rows)


def test_what_is_not_supported_is_an_error_that_names_the_argument():
    hidden, weight, targets = (
        torch.zeros(4, 8),
        torch.zeros(9, 8),
        torch.zeros(4, dtype=torch.int64),
    )
    for call, words in [
        (
            lambda: ops.causal_attention(torch.zeros(1, 4, 3, 2, 96)),
            "qkv's head size D must be 32, 64 or 128 on CUDA",
        ),
        (
            lambda: ops.causal_attention(torch.zeros(1, 4, 3, 2, 32).double()),
            "qkv must be float32, bfloat16 or float16",
        ),
        (
            lambda: ops.causal_attention(torch.zeros(385)[1:].view(1, 2, 3, 2, 32)),
            "qkv must begin at a multiple of 16",
        ),
        (
            lambda: ops.token_logprob(hidden.double(), weight.double(), targets),
            "hidden must be float32, bfloat16 or",
        ),
        (
            lambda: ops.token_logprob(hidden, weight.cpu(), targets),
            "weight is on cpu but hidden is on cuda",
        ),
        (lambda: ops.token_logprob(hidden, weight, targets.cpu()), "targets is on cpu"),
        (lambda: ops.sample(hidden, seed=0, rows=targets.cpu(), step=targets), "rows is on cpu"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            "ops.token_logprob(torch.zeros(2, 8), torch.zeros(9, 8), torch.tensor([0, 9]))",
            "an entry of targets",
        ),
        (
            "ops.decode_attention(torch.zeros(1, 3, 1, 32), torch.zeros(0, 2, 1, 32), torch.tensor([[0, 0]]),"
            " torch.zeros(1, 4, 2, 1, 32), torch.tensor([4]))",
            "an entry of lengths",
        ),
    ],
)
def test_what_only_the_device_sees_is_an_assertion_that_names_the_argument(call, words):
    """In a separate process: a device-side assertion makes the CUDA context unusable."""
    setup = "import torch; from tinystory import ops; torch.set_default_device('cuda')"
    code = f"{setup}; {call}; torch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends_early", [False, True])
def test_stories_from_graphs_are_those_of_plain_calls(
    request, tokenizer, monkeypatch, ends_early, dtype
):
    """Bit for bit, also after the weights have changed since the last rollout; one graph capture
    per batch size, for all rollouts."""
    with torch.device("cpu"):  # how many stories end early depends on the random weights
        student = request.getfixturevalue("student").to("cuda")
    head, sizes, capture = ValueHead(64), [], TokenStep.capture
    monkeypatch.setattr(
        TokenStep, "capture", lambda step: (sizes.append(step.batch_size), capture(step))[1]
    )
    torch.nn.init.normal_(head.linear.weight)
    with torch.no_grad():
        student.ln_f.bias += 2.4 * ends_early * student.unembedding[tokenizer.eos]

    def write():
        how = dict(first_index=0, max_new_tokens=30, seed=1)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return generate(student, head, tokenizer, ["Once upon a time,", "One day"] * 100, **how)

    before = None
    for _ in range(3):
        stories = write()
        assert sizes[0] == 200 and len(set(sizes)) == len(sizes) and set(sizes) <= {200, 100, 50}
        assert len(sizes) > 1 if ends_early else len(sizes) == 1
        with monkeypatch.context() as patch:
            patch.setattr(TokenStep, "advance", TokenStep.run)
            for story, plain in zip(stories, write(), strict=True):
                assert (story.index, story.text, story.ended) == (
                    plain.index,
                    plain.text,
                    plain.ended,
                )
                for column in ("tokens", "logprobs", "values", "entropies"):
                    assert torch.equal(getattr(story, column), getattr(plain, column))
        texts = [story.text for story in stories]
        assert texts != before
        before = texts
        with torch.no_grad():
            for p in [*student.parameters(), *head.parameters()]:
                p += 0.05 * p.std(correction=0) * torch.randn_like(p)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretraining_and_interaction_run(place, tmp_path, dtype):
    """Both commands end to end on the GPU; the loss falls, and PPO's first pass reproduces the
    sampler's logprobs."""
    on_gpu = ["--device", "cuda", "--dtype", dtype]
    with torch.device("cpu"):
        corpus = ["--corpus", str(place / "corpus.txt"), "--words", "6000"]
        pretrain.main([*corpus, "--out", str(tmp_path / "p"), *SMALL, *on_gpu])
        reward = ["--reward", f"{place / 'reward.py'}:score"]
        interact.main(
            ["--init", str(tmp_path / "p"), "--out", str(tmp_path / "i"), *reward, *SHORT, *on_gpu]
        )
    losses = [m["loss"] for m in metrics(tmp_path / "p")]
    assert losses[-1] < losses[0] - 0.3
    steps = metrics(tmp_path / "i")
    assert len(steps) == 4 and all(
        m["ratio_error"] < (1e-3 if dtype == "float32" else 0.2) for m in steps
    )
