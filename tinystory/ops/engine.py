"""Many stories from one opening: the compiled engine that runs all layers of a token step (csrc/cpu/engine.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinystory import ops


class Decoder:
    """Decodes with a snapshot of a GPT-2 student (see tinystory/student/model.py) on the CPU.

    parameters: float32, in the order of `Student.parameters()`, then the value head's weight and bias or nothing;
    they must not change while the decoder is used. dtype: of the products and of the cache, float32 or bfloat16; sums,
    norms, softmax and logits are float32. A story is a function of the parameters, the dtype, the prompt, the seed and
    its row id, bit for bit, whatever the batch and however many the threads.
    """

    def __init__(self, parameters: Sequence[Tensor], heads: int, dtype: torch.dtype = torch.float32):
        parameters = [p.detach() for p in parameters]
        self._engine = torch.classes.tinystory.Decoder(parameters, heads, dtype == torch.bfloat16)

    @staticmethod
    def runs(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this machine has the engine for tensors there and products of that type."""
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not ops.load():
            return False
        return dtype == torch.float32 or torch.ops.tinystory.decoder_has_bf16()

    def start(
        self,
        prompt: Tensor,
        *,
        count: int,
        max_new_tokens: int,
        eos: int,
        seed: int,
        first_row: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read the prompt (P,) int64, once for all `count` stories; story i draws as `ops.sample` does for row id
        first_row + i. Returns tokens int64, logprobs, values and entropies float32, each (count, max_new_tokens) and
        filled by the steps to come."""
        self._engine.start(prompt, count, max_new_tokens, eos, seed, first_row, temperature, top_k, top_p)
        return self._engine.outputs()

    def step(self) -> list[int]:
        """Draw the next token of every story that has not ended. Returns those that end with it: they drew `eos`, or
        it is their last. RuntimeError if a logit is not finite."""
        return self._engine.step()
