"""The student's trunk gives the same results with each attention function, and has GPT-2's
layout."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import using
from tinystory.config import PretrainConfig
from tinystory.ops import reference
from tinystory.run.errors import UserError
from tinystory.student.model import KVCache, Student, StudentConfig, ValueHead, to_device
from tinystory.student.optim import make_optimizer


def test_reading_and_writing_agree(student):
    """Token by token with the cache gives the hidden states of the whole sequence, with rows of
    different lengths together."""
    torch.manual_seed(1)
    tokens = torch.randint(5, student.config.vocab_size, (3, 20))
    tokens[1, :6] = tokens[0, :6]
    whole = student.hidden(tokens)
    device = student.wte.weight.device
    # the last row's opening is another, of 4 tokens
    spans = torch.tensor([[0, 6], [0, 6], [6, 10]], device=device)
    cache = KVCache(student.config, spans, capacity=16, dtype=torch.float32, prefix=10)
    read = student.prefill([tokens[0, :6].cpu(), tokens[2, :4].cpu()], cache)
    torch.testing.assert_close(read, torch.stack([whole[0, 5], whole[2, 3]]), atol=1e-4, rtol=1e-4)
    rows, behind = torch.arange(3), torch.tensor([0, 0, 2])
    for t in range(6, 14):
        read = student.step(tokens[rows, t - behind], cache)
        torch.testing.assert_close(read, whole[rows, t - behind], atol=1e-4, rtol=1e-4)
    remaining, behind = torch.tensor([2, 0]), torch.tensor([2, 0])
    cache.keep(remaining)
    for t in range(14, 20):
        read = student.step(tokens[remaining, t - behind], cache)
        torch.testing.assert_close(read, whole[remaining, t - behind], atol=1e-4, rtol=1e-4)


def test_the_trunk_is_gpt2s_block_by_the_paper(student):
    """ln_f(x) after x = x + attn_proj(attention(ln_1(x))) and x = x + mlp_proj(gelu(fc(ln_2(x)))),
    written out."""
    torch.manual_seed(3)
    tokens = torch.randint(5, student.config.vocab_size, (2, 12))
    x = student.wte(tokens) + student.wpe(torch.arange(12))
    for block in student.blocks:
        normed = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias)
        qkv = F.linear(normed, block.qkv.weight, block.qkv.bias).unflatten(
            -1, (3, student.config.n_head, -1)
        )
        attention = reference.causal_attention(qkv).flatten(-2)
        x = x + F.linear(attention, block.attn_proj.weight, block.attn_proj.bias)
        normed = F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias)
        inner = F.gelu(F.linear(normed, block.fc.weight, block.fc.bias), approximate="tanh")
        x = x + F.linear(inner, block.mlp_proj.weight, block.mlp_proj.bias)
    expected = F.layer_norm(x, x.shape[-1:], student.ln_f.weight, student.ln_f.bias)
    torch.testing.assert_close(student.hidden(tokens), expected, atol=1e-4, rtol=1e-4)


def test_attend_gets_each_layers_packed_qkv_in_order(student):
    seen = []

    def attend(i, qkv):
        seen.append((i, qkv.shape))
        return qkv[..., 2, :, :]

    student.trunk(torch.randn(2, 3, 64), attend)
    heads = student.config.n_head
    assert seen == [(i, (2, 3, 3, heads, 64 // heads)) for i in range(student.config.n_layer)]


def test_positions_and_tokens_start_in_channels_of_their_own_and_positions_do_not_learn():
    student = Student(StudentConfig(1, 2, 64, 32, 300, tied=False), "unit")
    positional = student.wpe.weight.any(0)
    lexical = student.wte.weight.any(0)
    assert positional.sum() == 8
    assert lexical.sum() == 32
    assert not (positional & lexical).any()
    assert student.wte.weight[:, lexical].all()
    assert torch.equal(student.unembedding[:, lexical], student.wte.weight[:, lexical])
    assert student.unembedding[:, ~positional].all()
    for weight in student.weights("proj"):
        assert torch.equal(weight.any(1), ~positional & ~lexical)
    optimizer = make_optimizer(student, PretrainConfig(weight_decay=0.1), torch.float32)
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is not student.wpe.weight for p in learning)
    assert len(learning) == len(list(student.parameters())) - 1


def test_no_token_sees_a_later_one(student):
    torch.manual_seed(2)
    tokens = torch.randint(5, student.config.vocab_size, (1, 30))
    changed = tokens.clone()
    changed[:, 17:] = torch.randint(5, student.config.vocab_size, (1, 13))
    torch.testing.assert_close(student.hidden(tokens)[:, :17], student.hidden(changed)[:, :17])
    assert not torch.equal(student.hidden(tokens)[:, 17:], student.hidden(changed)[:, 17:])


def test_dropout_is_drawn_from_the_seeds_and_only_in_training(student):
    tokens = torch.randint(5, student.config.vocab_size, (2, 16))

    def hidden(torch_seed: int, seed: int):
        torch.manual_seed(torch_seed)
        return student.hidden(tokens, dropout=0.2, seed=seed)

    assert torch.equal(hidden(0, 0), hidden(0, 0))
    assert not torch.equal(hidden(0, 0), hidden(1, 0))
    assert not torch.equal(hidden(0, 0), hidden(0, 1))
    assert torch.equal(student.hidden(tokens), student.hidden(tokens, seed=5))


@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 4, 128)])
def test_size_is_gpt2s(shape):
    """12 C^2 + 13 C a block, the two embeddings, the last norm: GPT-2's count with tied
    embeddings."""
    n_layer, n_head, C = shape
    student = Student(StudentConfig(n_layer, n_head, C, context=64, vocab_size=300))
    assert (
        sum(p.numel() for p in student.parameters())
        == n_layer * (12 * C * C + 13 * C) + (300 + 64) * C + 2 * C
    )


def test_value_head_starts_at_zero(student):
    hidden = student.hidden(torch.randint(5, 300, (2, 8)))
    assert torch.equal(ValueHead(64)(hidden), torch.zeros(2, 8))


def test_a_head_size_that_no_cuda_kernel_has_is_refused_in_a_sentence():
    student = Student(StudentConfig(n_layer=1, n_head=2, n_embd=96, context=8, vocab_size=16))
    with using("auto"), pytest.raises(UserError, match=r"heads have size 48.*--n-head"):
        to_device(student, "cuda")
    assert to_device(student, "cpu") is student
