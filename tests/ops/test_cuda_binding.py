"""Where torch has CUDA and a toolkit is there, the kernels compile, link, load and register. Needs
no GPU."""

import re

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from tinystory import ops
from tinystory.ops import cuda

pytestmark = pytest.mark.skipif(bool(cuda.why_not()), reason=cuda.why_not())

OPS = re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "cuda" / "ops.cpp").read_text())


@pytest.mark.parametrize("name", OPS)
def test_the_cuda_kernel_is_registered(name):
    cuda.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tinystory::{name}", "CUDA")


def test_shapes_and_types_are_known_without_a_gpu():
    """torch.compile traces with fake tensors, here on a CUDA device that is not there."""
    cuda.load()
    with FakeTensorMode(), torch.device("cuda"):
        out = ops.causal_attention(torch.empty(2, 9, 3, 4, 64, dtype=torch.bfloat16))
        assert (
            out.shape == (2, 9, 4, 64) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        )
        new, prefix, cache = (
            torch.empty(5, 3, 4, 64),
            torch.empty(7, 2, 4, 64),
            torch.empty(5, 20, 2, 4, 64),
        )
        ids, spans = torch.empty(5, dtype=torch.int64), torch.empty(5, 2, dtype=torch.int64)
        assert ops.decode_attention(new, prefix, spans, cache, ids).shape == (5, 4, 64)
        tokens, logprobs, _ = ops.sample(torch.empty(5, 100), seed=0, rows=ids, step=0)
        assert tokens.dtype == torch.int64 and logprobs.shape == (5,)
        hidden, weight = torch.empty(5, 8), torch.empty(100, 8)
        (logprob, entropy), loss = (
            ops.token_logprob(hidden, weight, ids),
            ops.cross_entropy(hidden, weight, ids),
        )
        assert logprob.shape == entropy.shape == (5,) and loss.shape == ()
