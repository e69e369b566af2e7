"""Many stories at once, by the C++ engine that runs all layers of a token step (csrc/cpu/engine.cpp)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tinystory import ops


@dataclass(frozen=True)
class Layout:
    """A description of a transformer, as far as its parameters' names and shapes do not give it.

    The engine knows norm "pre-layer-norm", activation "gelu-tanh", positions "learned", a bias in every layer and norm,
    and an output head tied to the embedding. It refuses anything else.
    """

    n_layer: int
    n_head: int
    norm: str
    activation: str
    positions: str
    bias: bool
    tied_head: bool


class Engine:
    """Decodes on the CPU with a snapshot of a student (tinystory/student/model.py).

    parameters: float32, contiguous, by name: `dict(student.named_parameters())` and, for values, those of the value
    head as "value_head.linear.weight" and "value_head.linear.bias". They must not change while the engine is used.
    dtype: of the matmuls and of the KV cache, float32 or bfloat16; sums, norms, softmax and logits are float32.

    A story is a function of the parameters, the dtype, the prompt, the seed and its row id, bit for bit: neither the
    rest of the batch nor the number of threads changes it.

    Raises ValueError if a parameter is missing, unexpected or of the wrong shape or type, if the layout is unknown, or
    if this machine has no matmul of that dtype.
    """

    def __init__(self, parameters: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32):
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        module = ops.load()
        assert module is not None, "Engine.runs says whether there is an engine"
        self._engine = module.Engine(detached, **asdict(layout), dtype=dtype)

    @staticmethod
    def runs(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the engine runs on this device with matmuls of this dtype, on this machine."""
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not (module := ops.load()):
            return False
        return dtype == torch.float32 or module.engine_has_bf16()

    def start(
        self,
        prompts: Sequence[Tensor],
        which: Tensor,
        *,
        max_new_tokens: int,
        eos: int,
        seed: int,
        first_row: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read each prompt, (P_i,) int64, once. Story i continues prompts[which[i]], which (count,) int64, and draws as
        `ops.sample` does for row id first_row + i.

        Returns tokens int64 and logprobs, values and entropies float32, each (count, max_new_tokens) and filled by the
        following steps: logprobs and entropies in nats, as `ops.sample` defines them. Raises RuntimeError if an
        argument is out of range."""
        return self._engine.start(list(prompts), which, max_new_tokens, eos, seed, first_row, temperature, top_k, top_p)

    def step(self) -> list[int]:
        """Draw the next token of every story that has not ended. Returns the stories that end with it: they drew `eos`,
        or it is their last. Raises RuntimeError if a logit is not finite."""
        return self._engine.step()
