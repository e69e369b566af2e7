"""Run by test_cuda_on_cpu.py in a process of its own: the GPU's path whole, its binding and kernels on the SIMT
machine, in place of the CPU's operators. Losses, gradients and stories must be the CPU's.

cuda_on_cpu.py LIBRARY
"""

import sys

import torch
from conftest import assert_no_worse

from tinystory import ops
from tinystory.ops import backend, reference
from tinystory.ops.backend import Backend
from tinystory.student.generate import StudentDecoder
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.token_step import Sampling

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def trained(student: Student, tokens: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter."""
    student.zero_grad()
    with student.lowered(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype == BF16):
            hidden = student.hidden(tokens[:, :-1]).flatten(0, 1)
            loss = ops.cross_entropy(hidden, student.wte.weight, tokens[:, 1:].flatten())
        loss.backward()
    return [loss.detach(), *(p.grad for p in student.parameters())]


@torch.no_grad()
def stories(student: Student, head: ValueHead, sampling: Sampling) -> list[torch.Tensor]:
    decoder, stories = StudentDecoder(student, head, sampling), {}
    decoder.start([torch.tensor([5, 6, 7]), torch.tensor([8])], [0, 1] * 3, 0)
    while len(stories) < 6:
        stories |= dict(decoder.step())
    return [torch.cat(column) for column in zip(*(stories[i] for i in range(6)), strict=True)]


def main(library: str) -> None:
    torch.manual_seed(0)
    student, head = Student(StudentConfig(2, 2, 64, 40, 96), "unit"), ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    tokens = torch.randint(96, (2, 17))
    samplings = [Sampling(8, eos=3, seed=1, **options) for options in ({}, {"top_k": 5}, {"top_p": 0.8})]
    assert ops.load(), "the kernels are not compiled"
    exact = trained(student.double(), tokens, F32)
    student.float()
    trained_here = {F32: trained(student, tokens, F32)}
    stories_here = [stories(student, head, sampling) for sampling in samplings]
    with backend.using(Backend("reference")):  # plain PyTorch rounds as often as CUDA's path
        trained_here[BF16] = trained(student, tokens, BF16)

    torch.ops.load_library(library)
    aten = torch.library.Library("aten", "IMPL", "CPU")
    aten.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype))  # which torch has on CUDA alone
    ops.on_gpu = lambda x: True
    for dtype, here in trained_here.items():
        for i, (a, b, c) in enumerate(zip(trained(student, tokens, dtype), here, exact, strict=True)):
            assert_no_worse(a, b, c, f"{dtype}, result {i}")
    for sampling, here in zip(samplings, stories_here, strict=True):
        tokens_there, *others = stories(student, head, sampling)
        assert torch.equal(tokens_there, here[0]), sampling
        for a, b in zip(others, here[1:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for branch_type, dtype in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F16)):
        leaves = [torch.randn(37, 160), torch.randn(37, 160).to(branch_type), torch.randn(160), torch.randn(160)]
        grads = torch.randn(37, 160), torch.randn(37, 160).to(dtype)

        def run(f, leaves=leaves, grads=grads, dtype=dtype):
            inputs = [x.clone().requires_grad_() for x in leaves]
            outputs = f(*inputs, 0.25, 3, dtype)[:2]
            return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

        for a, b in zip(run(torch.ops.tinystory.add_layer_norm), run(reference.add_layer_norm), strict=True):
            assert a.dtype == b.dtype
            bound = 2e-5 if a.dtype == F32 else 2 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, atol=bound, rtol=bound)


if __name__ == "__main__":
    main(sys.argv[1])
