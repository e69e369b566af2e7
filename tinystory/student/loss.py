"""Next-word prediction: the loss of pretraining."""

import random

import torch
from torch import Tensor

from tinystory import ops
from tinystory.run import distributed
from tinystory.student.model import Student


def next_token_loss(
    student: Student,
    batch: Tensor,
    micro_batch_size: int,
    dtype: torch.dtype,
    *,
    dropout: float = 0.0,
    seeds: random.Random | None = None,
) -> Tensor:
    """The mean loss in nats per token, over all processes; adds the gradient of this process's rows to
    the student's. batch: (B, T + 1) int64; dtype: for the matmuls; seeds: for
    attention dropout."""
    loss = torch.zeros((), device=batch.device)
    autocast = torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with student.lowered(dtype):
        for rows in distributed.shard_strided(batch).split(micro_batch_size):
            inputs = rows[:, :-1]
            targets = rows[:, 1:].flatten()
            seed = seeds.getrandbits(48) if seeds else 0
            with autocast:
                hidden = student.hidden(inputs, dropout, seed).flatten(0, 1)
                nats = ops.cross_entropy(hidden, student.wte.weight, targets)
            rows_loss = nats * (len(rows) / len(batch))
            rows_loss.backward()
            loss += rows_loss.detach()
    return distributed.all_reduce_sum(loss)
