"""Next-word prediction: the loss of pretraining, which --replay-weight adds to interaction."""

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
    weight: float = 1.0,
    dropout: float = 0.0,
    seeds: random.Random | None = None,
) -> Tensor:
    """The mean loss in nats per token, over all processes; adds `weight` times the gradient of this
    process's rows to the student's. batch: (B, T + 1) int64; dtype: for the matmuls; seeds: for
    attention dropout."""
    loss = torch.zeros((), device=batch.device)
    with student.lowered(dtype):
        for part in distributed.shard_strided(batch).split(micro_batch_size):
            with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
                hidden = student.hidden(
                    part[:, :-1], dropout, seed=seeds.getrandbits(48) if seeds else 0
                )
                nats = ops.cross_entropy(
                    hidden.flatten(0, 1), student.wte.weight, part[:, 1:].flatten()
                )
            part_loss = nats * (len(part) / len(batch))
            (weight * part_loss).backward()
            loss += part_loss.detach()
    return distributed.all_reduce_sum(loss)
