"""The optimizer of pretraining and its learning-rate schedule."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tinystory.config import PretrainConfig
from tinystory.student.model import Student
from tinystory.student.muon import MuonAdamW

EPS = 1e-8  # AdamW's eps, the default of PyTorch and transformers


def make_optimizer(student: Student, config: PretrainConfig, dtype: torch.dtype) -> Optimizer:
    """AdamW on the named parameters that learn: a group of matrices, with weight decay, then a
    group of vectors. With --optimizer muon: MuonAdamW, with the blocks' matrices as the first
    group. dtype: dtype of Muon's matmuls."""
    blocks = []
    matrices = []
    vectors = []
    for name, p in student.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append((name, p))
        elif config.optimizer == "muon" and name.startswith("blocks."):
            blocks.append((name, p))
        else:
            matrices.append((name, p))
    groups = [
        dict(params=matrices, weight_decay=config.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    betas = (0.9, config.beta2)
    options: dict[str, Any] = dict(lr=config.learning_rate, betas=betas, eps=EPS, fused=True)
    if config.optimizer != "muon":
        return torch.optim.AdamW(groups, **options)
    return MuonAdamW(blocks, groups, heads=student.config.n_head, dtype=dtype, **options)


def clip_gradients(optimizer: Optimizer, grad_norm: Tensor, max_norm: float) -> None:
    """Make the next step of `make_optimizer`'s optimizer clip the gradient to a norm of at most
    max_norm. Both optimizers divide the gradient when they read it, so clipping takes no extra pass
    over memory. Raises TypeError for an optimizer that would ignore the divisor."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} reads no grad_scale: use a fused optimizer")
    scale = (grad_norm / max_norm).clamp(min=1.0)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]


def set_learning_rate(optimizer: Optimizer, config: PretrainConfig, words: int) -> float:
    """AdamW's learning rate after `words` words, which is also set in the optimizer: linear
    warm-up, then linear decay to 0 at config.words. Muon's learning rate is set in proportion."""
    progress = min(words / config.words, 1.0)
    if progress < config.warmup:
        # Before the first step no words have been read. This step has the rate at 1 % of the
        # warm-up instead of 0.
        rate = config.learning_rate * max(progress / config.warmup, 0.01)
    else:
        rate = config.learning_rate * ((1 - progress) / (1 - config.warmup))
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "muon" in group:
            group["lr"] *= config.muon_learning_rate / config.learning_rate
    return rate
