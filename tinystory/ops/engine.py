"""Decoding on a CPU: the C++ engine that runs all layers of a token step (csrc/cpu/engine.cpp)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinystory.ops import backend


@dataclass(frozen=True)
class Sampling:
    """eos: the end token. temperature, top_k, top_p: as in `ops.sample`."""

    max_new_tokens: int
    eos: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Engine:
    """Decodes many stories at once with a student (tinystory/student/model.py).

    parameters: float32, contiguous, by name: `dict(student.named_parameters())` and, for values, those of the value
    head as "value_head.linear.weight" and "value_head.linear.bias". They must not change while the engine is used.
    dtype: of the matmuls and of the KV cache, float32 or bfloat16; sums, norms, softmax and logits are float32. Neither
    the rest of the batch nor the number of threads changes a bit of a story. Raises ValueError if a parameter is
    missing, unexpected or of the wrong shape or type, or if this machine has no matmul of that dtype.
    """

    def __init__(self, parameters: Mapping[str, Tensor], n_layer: int, n_head: int, dtype: torch.dtype = torch.float32):
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        module = backend.load()
        assert module is not None, "Engine.runs says whether there is an engine"
        self._engine = module.Engine(detached, n_layer, n_head, dtype)

    @staticmethod
    def runs(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the engine runs on this device with matmuls of this dtype, on this machine."""
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not (module := backend.load()):
            return False
        return dtype == torch.float32 or module.engine_has_bf16()

    def start(
        self, prompts: Sequence[Tensor], prompt_of: Tensor, sampling: Sampling, first_row: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Start a story for each entry of prompt_of, (count,) int64. Story i continues prompts[prompt_of[i]] and draws
        as `ops.sample` does for row id first_row + i. Each prompt, (P_i,) int64, is read once. Returns
        tokens int64 and logprobs, values and entropies float32, each (count, max_new_tokens) and filled by the
        following steps. Raises RuntimeError if an argument is out of range."""
        s = sampling
        sizes = s.max_new_tokens, s.eos, s.seed, first_row
        return self._engine.start(list(prompts), prompt_of, *sizes, s.temperature, s.top_k, s.top_p)

    def step(self) -> list[int]:
        """The stories that end with the next token, which every story that has not ended draws: they drew `eos`, or it
        is their last. Raises RuntimeError if a logit is not finite."""
        return self._engine.step()
