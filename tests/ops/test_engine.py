"""The C++ engine against the loop in Python and the student's forward pass; arguments that the
engine refuses."""

import threading

import pytest
import torch
import torch.nn.functional as F

from tinystory import ops
from tinystory.student import generate
from tinystory.student.generate import EngineDecoder, StudentDecoder, engine_runs
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.token_step import Sampling

CPU = torch.device("cpu")
EOS = 2
NO_BF16 = pytest.mark.skipif(
    not engine_runs(CPU, torch.bfloat16), reason="no bfloat16 matmul on this processor"
)
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=NO_BF16)]


@pytest.fixture(autouse=True)
def compiled():
    if not engine_runs(CPU, torch.float32):
        pytest.skip("the kernels are not compiled")


def make(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=320, tied=False, end=0.0):
    """A student with weights far enough from zero that every path matters. With a higher `end`,
    stories end sooner."""
    torch.manual_seed(n_layer * n_embd + vocab_size)
    student = Student(StudentConfig(n_layer, n_head, n_embd, context, vocab_size, tied))
    head = ValueHead(n_embd)
    for p in [*student.parameters(), *head.parameters()]:
        torch.nn.init.normal_(p, std=0.2) if p.dim() >= 2 else torch.nn.init.normal_(
            p, mean=float(p[0] == 1), std=0.1
        )
    with torch.no_grad():
        student.ln_f.bias += end * student.unembedding[EOS]
    return student, head


def engine_of(student, head=None, dtype=torch.float32):
    """An engine for the student; values are 0 without a head."""
    values = {} if head is None else dict(head.named_parameters(prefix="value_head"))
    return new_engine(
        dict(student.named_parameters()) | values,
        student.config.n_layer,
        student.config.n_head,
        dtype,
    )


def new_engine(parameters, n_layer, n_head, dtype=torch.float32):
    parameters = {name: p.detach() for name, p in parameters.items()}
    return ops.load().Engine(parameters, n_layer, n_head, dtype, generate.CACHE)


def start(engine, prompts, prompt_of, s, at_once=1000):
    sizes = s.max_new_tokens, s.eos, s.seed, 0, at_once
    return engine.start(prompts, prompt_of, *sizes, s.temperature, s.top_k, s.top_p)


def write(
    kind,
    student,
    head,
    dtype=torch.float32,
    prompt=(5, 6, 7, 8, 9),
    count=24,
    first_row=0,
    **options,
):
    """All stories by this class of decoder: (count, max_new_tokens) columns, 0 after a story's end,
    and the index of each story's last token."""
    sampling = Sampling(**dict(max_new_tokens=30, eos=EOS, seed=7) | options)
    last, stories = torch.full((count,), -1), {}
    with torch.no_grad(), torch.autocast("cpu", enabled=dtype != torch.float32):
        # stories at a time
        decoder = kind(student, head, sampling, *[32] * (kind is EngineDecoder))
        decoder.start([torch.tensor(prompt)], [0] * count, first_row)
        while len(stories) < count:
            for row, columns in decoder.step():
                assert row not in stories
                stories[row], last[row] = columns, len(columns[0]) - 1
    columns = zip(*(stories[row] for row in range(count)), strict=True)
    room = sampling.max_new_tokens
    return [torch.stack([F.pad(x, (0, room - len(x))) for x in column]) for column in columns], last


@torch.no_grad()
def read_again(student, head, prompt, outputs, temperature):
    """Log-probs, values and entropies that the student's forward pass gives the same tokens."""
    tokens = outputs[0]
    whole = torch.cat([torch.tensor(prompt).expand(len(tokens), -1), tokens], 1)[:, :-1]
    hidden = student.hidden(whole)[:, len(prompt) - 1 :]
    log_p = (student.logits(hidden).double() / temperature).log_softmax(-1)
    return (
        log_p.gather(2, tokens[..., None])[..., 0],
        head(hidden).float(),
        -(log_p.exp() * log_p).sum(-1),
    )


# Widths that are not whole panels of 64 columns, head sizes of 16 and of 5 vectors, batches beyond
# and below a tile of 6 rows, prompts and stories of one token and across blocks of 16 positions.
SHAPES = [
    dict(),
    dict(n_layer=3, n_head=3, n_embd=48, vocab_size=301),
    dict(n_layer=1, n_head=2, n_embd=160, vocab_size=65, tied=True),
    dict(n_layer=1, n_head=1, n_embd=256, vocab_size=2500),
]


@pytest.fixture(params=["by rows", "by columns"])
def split(request, monkeypatch):
    """How the threads share a token step: as for a small student, with weights that stay in the
    caches, or as for a large student."""
    if request.param == "by columns":
        monkeypatch.setattr(generate, "CACHE", 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(count=1, prompt=(5,), max_new_tokens=1),
        dict(count=7, prompt=tuple(range(10, 43)), max_new_tokens=20),
        dict(count=5, top_k=7, top_p=0.8, temperature=0.7, first_row=10**12, seed=-3),
    ],
    ids=str,
)
def test_stories_are_those_of_the_plain_loop(split, shape, options):
    student, head = make(**shape, end=1.0)
    ours, last = write(EngineDecoder, student, head, **options)
    plain, plain_last = write(StudentDecoder, student, head, **options)
    assert torch.equal(last, plain_last)
    assert torch.equal(ours[0], plain[0])
    for column, same in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(column, same, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_results_are_those_of_the_forward_pass(dtype, temperature):
    """The tokens are drawn from the distribution that PPO computes again. bfloat16 is no further
    from float32 than PyTorch's own."""
    student, head = make(n_layer=4, n_head=4, n_embd=128, vocab_size=500, end=0.5)
    prompt = (5, 6, 7)
    outputs, last = write(
        EngineDecoder, student, head, dtype, prompt, count=40, temperature=temperature
    )
    mask = torch.arange(30) <= last[:, None]
    exact = read_again(student, head, prompt, outputs, temperature)
    with torch.autocast("cpu"):
        lower = read_again(student, head, prompt, outputs, temperature)
    for column, truth, low in zip(outputs[1:], exact, lower, strict=True):
        error, theirs = (column - truth)[mask], (low - truth)[mask]
        bound = (
            1e-4 * max(1, truth.abs().max()) if dtype == torch.float32 else 1.5 * theirs.abs().max()
        )
        assert error.abs().max() < bound
        assert error.mean().abs() < bound / 10  # rounding has no bias


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_story_is_the_same_to_the_bit_in_any_batch_and_on_any_threads(split, dtype):
    student, head = make(n_layer=2, n_head=3, n_embd=144, vocab_size=700, end=1.2)
    together, last = write(EngineDecoder, student, head, dtype, count=50)
    assert len(set(last.tolist())) > 3  # the batch shrank many times
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for first, count in ((0, 50), (0, 1), (13, 1), (20, 7), (49, 1)):
            part, _ = write(EngineDecoder, student, head, dtype, count=count, first_row=first)
            for column, whole in zip(part, together, strict=True):
                assert torch.equal(column, whole[first : first + count])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("at_once", [1, 2, 7, 59])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stories_that_begin_as_others_end_are_the_same_to_the_bit(split, dtype, at_once):
    """Several stories share prompts of different lengths, and some prompts come again after others.
    No story is begun before there is room, and none is left out."""
    student, head = make(n_layer=2, n_head=2, n_embd=96, vocab_size=400, end=1.2)
    prompts = [torch.arange(5, 5 + n) for n in (1, 19, 4, 33, 16, 7)]
    prompt_of = torch.tensor([i // 3 % 6 for i in range(40)] + [i % 6 for i in range(20)])
    s = Sampling(25, eos=EOS, seed=3)

    def write_all(at_once):
        engine = engine_of(student, head, dtype)
        outputs, ended, begun = start(engine, prompts, prompt_of, s, at_once), {}, at_once
        for t in range(1, 60 * 25 + 1):
            step = engine.step()
            assert all(row not in ended and row < begun for row, _ in step)
            ended |= dict(step)
            begun = len(ended) + at_once
            if len(ended) == 60:
                return outputs, ended, t
        raise AssertionError("stories are missing")

    together, lengths, steps = write_all(60)
    apart, same_lengths, more_steps = write_all(at_once)
    assert (
        all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
        and same_lengths == lengths
    )
    assert len(set(lengths.values())) > 5 and steps <= 25
    # the batch is full until no story is left to begin
    assert more_steps <= sum(lengths.values()) / at_once + 25


def test_a_story_ends_with_its_first_end_token():
    student, head = make(end=1.5)
    outputs, last = write(EngineDecoder, student, head)
    assert set(last.tolist()) - {29}
    assert (outputs[0] == EOS).sum() == (outputs[0].gather(1, last[:, None]) == EOS).sum()


def test_without_a_value_head_values_are_zero():
    student, head = make()
    ours, _ = write(EngineDecoder, student, head)
    bare, _ = write(EngineDecoder, student, None)
    assert torch.equal(ours[0], bare[0]) and (bare[2] == 0).all() and (ours[2] != 0).any()


def test_an_engine_starts_again_and_agrees_with_itself():
    student, head = make()
    engine = engine_of(student, head)
    runs = []
    for count, prompt in ((3, [5, 6]), (24, [9, 8, 7]), (3, [5, 6])):
        prompt_of = torch.zeros(count, dtype=torch.int64)
        tokens, *_ = start(engine, [torch.tensor(prompt)], prompt_of, Sampling(12, eos=-1, seed=1))
        for _ in range(12):
            ended = engine.step()
        assert ended == [(row, 12) for row in range(count)] and engine.step() == []
        runs.append(tokens)
    assert torch.equal(runs[0], runs[2])


def test_logits_that_are_not_finite_are_an_error():
    student, head = make()
    with torch.no_grad():
        student.ln_f.bias[3] = float("nan")
    with pytest.raises(RuntimeError, match="story 4 at token 0 are not finite"):
        write(EngineDecoder, student, head, first_row=4)


def drop(name):
    return lambda parameters: parameters.pop(name)


def add(name, *shape):
    return lambda parameters: parameters.__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    "change, words",
    [
        (drop("blocks.1.fc.bias"), r"parameter blocks\.1\.fc\.bias is missing"),
        (drop("wte.weight"), r"parameter wte\.weight is missing"),
        (
            add("lm_head.weight", 300, 64),
            r"lm_head\.weight must have shape \(320, 64\), not \(300, 64\)",
        ),
        (
            add("blocks.2.ln_1.weight", 64),
            r"parameter blocks\.2\.ln_1\.weight of shape \(64\) is unexpected",
        ),
        (
            add("blocks.0.fc.weight", 128, 64),
            r"fc\.weight must have shape \(256, 64\), not \(128, 64\)",
        ),
        (
            lambda p: p.update({"ln_f.bias": p["ln_f.bias"].double()}),
            r"ln_f\.bias must be contiguous float32",
        ),
        (
            lambda p: p.update({"wpe.weight": p["wpe.weight"].T}),
            r"wpe\.weight must be contiguous float32",
        ),
    ],
)
def test_other_parameters_are_refused(change, words):
    student, _ = make()
    parameters = dict(student.named_parameters())
    change(parameters)
    with pytest.raises(ValueError, match=words):
        new_engine(parameters, n_layer=2, n_head=2)


@pytest.mark.parametrize(
    "n_layer, n_head, words",
    [
        (1, 2, r"parameter blocks\.1\.\S+ of shape \S+ is unexpected"),
        (3, 2, r"parameter blocks\.2\.\S+ is missing"),
        (2, 8, "64 / 8 must be a multiple of 16"),
    ],
)
def test_other_layers_and_heads_are_refused(n_layer, n_head, words):
    student, _ = make()
    with pytest.raises(ValueError, match=words):
        new_engine(dict(student.named_parameters()), n_layer, n_head)


def another_norm(student):
    student.blocks[1].ln_2 = torch.nn.RMSNorm(64)


def no_bias(student):
    student.blocks[1].fc.bias = None


def one_more_parameter(student):
    student.blocks[1].gate = torch.nn.Parameter(torch.zeros(64))


@pytest.mark.parametrize("change", [another_norm, no_bias, one_more_parameter])
def test_a_student_whose_block_has_changed_is_refused(change):
    """The engine takes weights by name, not by position, so that no wrong forward pass is
    computed."""
    student, head = make()
    change(student)
    with pytest.raises(ValueError, match=r"^Engine: .*; change csrc/cpu/engine\.cpp"):
        write(EngineDecoder, student, head)


def test_what_does_not_fit_is_an_error():
    engine = engine_of(make()[0])
    with pytest.raises(RuntimeError, match="call start first"):
        engine.step()
    valid = dict(prompt_of=[0, 0], max_new_tokens=5, eos=EOS, seed=0)
    wrong_options = [dict(prompt=[]), dict(prompt=[320]), dict(prompt=[-1]), dict(prompt=[1] * 60)]
    wrong_options += [dict(prompt_of=[]), dict(prompt_of=[0, 1]), dict(prompt_of=[-1])]
    wrong_options += [
        dict(max_new_tokens=0),
        dict(temperature=0.0),
        dict(top_p=0.0),
        dict(top_k=-1),
    ]
    for wrong in wrong_options:
        with pytest.raises(RuntimeError, match=r"Engine\.start"):
            prompts = [torch.tensor(wrong.pop("prompt", [5]), dtype=torch.int64)]
            options = valid | wrong
            prompt_of = torch.tensor(options.pop("prompt_of"), dtype=torch.int64)
            start(engine, prompts, prompt_of, Sampling(**options))


def test_other_threads_run_while_a_step_does():
    """The teacher's client talks while stories are being written."""
    student, _ = make(n_layer=8, n_head=4, n_embd=256, vocab_size=4000)
    engine = engine_of(student)
    start(
        engine,
        [torch.tensor([5])],
        torch.zeros(200, dtype=torch.int64),
        Sampling(40, eos=-1, seed=0),
    )
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.0005):
            ticks[0] += 1

    other = threading.Thread(target=tick)
    other.start()
    try:
        for _ in range(40):  # until the other thread gets a turn in one of them
            before = ticks[0]
            engine.step()
            if ticks[0] > before:
                return
    finally:
        stop.set()
        other.join()
    pytest.fail("no other thread ran during a step")


def test_the_engine_says_what_it_cannot_run():
    assert not engine_runs(torch.device("cuda"), torch.float32)
    assert not engine_runs(CPU, torch.float16)
