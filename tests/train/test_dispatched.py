"""The number of operators that the GPU's path dispatches, counted on a CPU; and the same results as
the CPU's path.

The counts do not depend on the size of a layer, so a small student with twelve layers has the
counts of GPT-2-small. docs/kernels.md has them in a table."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

import train_pretrain as pretrain
from tinystory import ops
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.data.shards import TokenFile
from tinystory.evaluate.validation import validate
from tinystory.rl import ppo
from tinystory.rl.batch import Batch, collate
from tinystory.rl.learners import LEARNERS
from tinystory.rl.policy import Policy
from tinystory.student.generate import Story
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.token_step import Sampling, TokenStep

# of twins that replace a kernel
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")
LAYERS = 12
BF16 = torch.bfloat16


class Count(TorchDispatchMode):
    """Counts what is dispatched, views and queries of a tensor's device apart."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "prim":
            self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def addmm_gelu(bias, a, b, *, use_gelu):
    """On CUDA it is the tanh GELU; the CPU's own is not."""
    return F.gelu(bias.addmm(a, b), approximate="tanh")


@pytest.fixture(scope="module")
def twins():
    """Plain twins of the operators that only CUDA has, or has otherwise."""
    if not ops.load():
        pytest.skip("the kernels are not compiled")
    aten = torch.library.Library("aten", "IMPL", "CPU")
    aten.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype))
    aten.impl("_addmm_activation", addmm_gelu)
    yield
    aten._destroy()


@pytest.fixture
def as_on_a_gpu(twins, monkeypatch):
    """On the CPU, the code takes every branch that a GPU would take."""
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)


def small_student(layers: int = LAYERS) -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(layers, 2, 64, 32, 96))


def second_micro_batch(run) -> Counter:
    """Calls in a step of two micro-batches beyond those in a step of one, so without what a step
    does once."""
    run(2)
    counts = []
    for rows in (2, 4):
        with Count() as count:
            run(rows)
        counts.append(count.calls)
    counts[1].subtract(counts[0])
    return +counts[1]


def pretraining(dropout: float) -> Counter:
    student, tokens = small_student(), torch.randint(96, (4, 17))
    config = PretrainConfig(batch_size=4, micro_batch_size=2, dropout=dropout, grad_clip=0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    return second_micro_batch(
        lambda rows: pretrain.train_step(student, optimizer, tokens[:rows], config, BF16, 0)
    )


def validation() -> Counter:
    student, tokens = small_student(), np.arange(400, dtype=np.uint16) % 96
    file = TokenFile(tokens, np.ones_like(tokens), np.array([0, 400]))

    def run(rows: int) -> None:
        with torch.autocast("cpu", BF16):
            validate(student, file, np.ones(96, np.int64), rows, batch=2, packing="stream")

    return second_micro_batch(run)


def written(rows: int) -> Batch:
    T, N = 16, 12
    stories = torch.randint(96, (rows, T + 1))
    zeros, each = torch.zeros(N), dict(text="", ended="length")
    told = [
        Story(
            i,
            str(i),
            prompt_ids=row[:-N],
            tokens=row[-N:],
            logprobs=zeros - 4.6,
            values=zeros,
            entropies=zeros,
            **each,
        )
        for i, row in enumerate(stories)
    ]
    batch = collate(told, torch.device("cpu"))
    return replace(
        batch, advantages=batch.values, ref_logprobs=batch.logprobs, returns=batch.values
    )


def update(student: Student, value_head: ValueHead | None, rows: int) -> None:
    config = InteractConfig(micro_batch_size=2, minibatch_size=0, epochs=1, lr_decay=False)
    parameters = [p for module in (student, value_head) if module for p in module.parameters()]
    parts = dict(
        student=student,
        learner=LEARNERS[config.learner],
        critic=value_head,
        optimizer=torch.optim.SGD(parameters, lr=0.0),
        config=config,
    )
    parts |= dict(autocast=lambda: torch.autocast("cpu", BF16), tokenizer=None, history={})
    ppo.update(Policy(**parts), written(rows), 0.0)


def interaction() -> Counter:
    student = small_student()
    return second_micro_batch(lambda rows: update(student, None, rows))


@torch.no_grad()
def token_step() -> Counter:
    student = small_student()
    with torch.autocast("cpu", BF16), student.lowered(BF16):
        step = TokenStep(student, ValueHead(64), 5, 9, Sampling(4, eos=0, seed=0))
        step.start([torch.arange(9)], [0] * 5, 0)
        with Count() as count:
            step.run()
    return +count.calls


MEASURED = {
    "pretraining": lambda: pretraining(0.0),
    "pretraining, dropout": lambda: pretraining(0.1),
}
MEASURED |= {"validation": validation, "PPO": interaction, "token step": token_step}
# Dispatched operators, and casts among them. torch's versions differ by a few.
BUDGETS = {"pretraining": (460, 3), "pretraining, dropout": (470, 3), "validation": (105, 3)}
BUDGETS |= {"PPO": (625, 9), "token step": (99, 2)}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget(as_on_a_gpu, name):
    calls, (most, casts) = MEASURED[name](), BUDGETS[name]
    assert calls.total() <= most and calls["aten._to_copy"] <= casts, calls


# --- it computes the same -------------------------------------------------------------------------
def trained(student: Student, tokens, dtype) -> list[torch.Tensor]:
    """The loss of every token, and the mean loss's gradient of every parameter. (In a mean, errors
    cancel by chance: PyTorch's own may be near 0, and is no measure then.)"""
    student.zero_grad()
    targets = tokens[:, 1:].flatten()
    with student.lowered(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype == BF16):
            hidden = student.hidden(tokens[:, :-1]).flatten(0, 1)
            loss = ops.cross_entropy(hidden, student.unembedding, targets)
            with torch.no_grad():
                logprobs, _ = ops.token_logprob(hidden, student.unembedding, targets)
        loss.backward()
    return [-logprobs, *(p.grad for p in student.parameters())]


def trained_on_each(student: Student, batches, dtype) -> list[torch.Tensor]:
    """The results of `trained`, stacked over batches: in one batch alone, an error may be small by
    chance."""
    results = [trained(student, tokens, dtype) for tokens in batches]
    return [torch.stack(column) for column in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_losses_and_gradients_are_those_of_the_cpu(as_on_a_gpu, monkeypatch, student, dtype):
    """Their errors are at most twice those of the CPU's path, which rounds less often, or one
    rounding error in dtype."""
    batches = torch.randint(student.config.vocab_size, (8, 3, 33))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "on_gpu", lambda x: False)
        exact = trained_on_each(student.double(), batches, torch.float32)
        student.float()
        theirs = trained_on_each(student, batches, dtype)
    ours = trained_on_each(student, batches, dtype)
    rounding = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_no_worse(a, b.to(a.dtype), c, f"result {i}", scale=rounding * c)


def test_copies_of_weights_change_no_bit_and_follow_the_weights(as_on_a_gpu, student):
    tokens = torch.randint(student.config.vocab_size, (2, 9))
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", BF16):
            with student.lowered(BF16):
                copied, where = student.hidden(tokens), [copy.data_ptr() for copy in student.copies]
            cast = student.hidden(tokens)
            assert torch.equal(copied, cast)
            student.blocks[0].qkv.weight += 0.1
    assert where == [copy.data_ptr() for copy in student.copies]
    assert all(block.qkv.copies is None for block in student.blocks)
