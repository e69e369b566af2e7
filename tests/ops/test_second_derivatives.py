"""The operators have no second derivatives. Without an error they would be 0 or lack terms."""

import pytest
import torch

from tinystory import ops

weight, bias, targets = torch.randn(64, 32), torch.randn(64), torch.arange(5)
OPERATORS = {
    "causal_attention": lambda x: ops.causal_attention(
        x.view(1, 5, 1, 1, 32).repeat(1, 1, 3, 1, 1)
    ),
    "token_logprob": lambda x: ops.token_logprob(x, weight, targets)[0],
    "cross_entropy": lambda x: ops.cross_entropy(x, weight, targets),
    "linear": lambda x: ops.linear(x, weight, bias),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, None, bias[:32], bias[32:])[1],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    x = torch.randn(5, 32, requires_grad=True)
    loss = OPERATORS[name](x).square().sum()
    with pytest.raises(RuntimeError, match=f"{name}: there are no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)
    loss.backward()
    assert x.grad is not None
