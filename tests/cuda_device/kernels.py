"""Kernels of the simulated device: every operator on device tensors runs on the CPU, at once, over
the same memory. Before the operator runs, it is checked for what a GPU would refuse, the reads and
writes are reported to the machine, and a stream that is being captured records the operator."""

from collections.abc import Callable, Iterator
from typing import Any

from machine import as_bytes, device, machine, where

# isort: split
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten
RANDOM = set(
    "native_dropout bernoulli bernoulli_ normal normal_ uniform_ randperm randint rand randn random_ exponential_ "
    "multinomial".split()
)
# Operators with a result of a size that depends on values, or that hand a value to the host.
WAITING = set(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal repeat_interleave bincount "
    "_linalg_svd _linalg_eigh linalg_eig".split()
)
INDEXING = set(
    "index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put".split()
)
# These are not pointwise by their tags, but take a CPU scalar.
SCALAR = set(
    "masked_fill masked_fill_ fill_ lerp where index_fill_ index_put_ _index_put_impl_ _foreach_mul_ _foreach_div_ "
    "_foreach_add_".split()
)
# These take a number instead of a tensor; the others need a tensor.
NUMBER = {
    name + end
    for name in "add sub mul div subtract multiply divide true_divide".split()
    for end in ("", "_")
}
OURS = (
    "causal_attention causal_attention_backward decode_attention sample token_logprob token_logprob_backward "
    "cross_entropy gelu_backward add_layer_norm add_layer_norm_backward".split()
)


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """One operator."""
    name = op._schema.name.split("::")[1]
    args = tuple(
        number_as_tensor(name, a, x) for a, x in zip(op._schema.arguments, args, strict=False)
    )
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    graph = GRAPHS.get(device.stream()) if machine.capturing is not None else None
    check(op, name, args, tensors, graph is not None)
    # id of a device tensor: itself, and a CPU tensor on its memory
    on_cpu: dict[int, tuple[Tensor, Tensor]] = {}

    def lower(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not isinstance(x, Tensor):
            return x
        if not x.is_cuda:
            return x.clone() if graph else x
        if id(x) not in on_cpu:  # an empty tensor may be an output that the kernel resizes
            empty = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            on_cpu[id(x)] = x, device.as_cpu(x, not graph) if x.numel() else empty
        return on_cpu[id(x)][1]

    lowered = pytree.tree_unflatten([lower(x) for x in leaves], tree)
    view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
    accesses = (
        []
        if view
        else list(accessed(op, name, args, kwargs, lambda x: on_cpu.get(id(x), (None, None))[1]))
    )
    clock = None if view or graph else machine.launch(name)
    if clock is not None:
        for access in accesses:
            machine.access(access[0], access[1], clock, access[2])
    kernel = implementation(op, name)
    result = kernel(*lowered[0], **lowered[1])
    of_alias = {id(alias): x for x, alias in on_cpu.values()}
    outputs: list[Tensor] = []

    def lift(r: Any) -> Any:
        if not isinstance(r, Tensor):
            return r
        if view:
            return torch.as_strided(args[0], r.size(), r.stride(), r.storage_offset())
        x = of_alias.get(id(r))
        if x is not None and x.shape == r.shape:
            return x
        if x is None:
            x = device.to_device(r)
            outputs.append(device.as_cpu(x, not graph))
        else:  # an output that was resized
            x.resize_(r.shape)
            outputs.append(device.as_cpu(x, not graph))
            outputs[-1].copy_(r)
        if clock is not None:
            machine.access(outputs[-1], True, clock)
        return x

    lifted = pytree.tree_map(lift, result)
    if graph and not view:
        graph.record(kernel, lowered, outputs, accesses)
    return lifted


GRAPHS: dict[int, Any] = {}  # per captured stream: its CUDAGraph


def number_as_tensor(name: str, argument: Any, x: Any) -> Any:
    """A tensor made of a number, for an operator that needs a tensor."""
    if type(x) not in (int, float, bool) or str(argument.type) != "Tensor" or name in NUMBER:
        return x
    number = torch.tensor(x, device="cpu", dtype=torch.float64 if type(x) is float else None)
    number.is_number = True  # type: ignore[attr-defined]
    return number


def check(op: Any, name: str, args: tuple, tensors: list[Tensor], captured: bool) -> None:
    """Raise what a GPU would, and count a wait."""
    for i, x in enumerate(tensors):
        if (
            x.is_cuda
            or hasattr(x, "is_number")
            or (x.dim() == 0 and (torch.Tag.pointwise in op.tags or name in SCALAR))
        ):
            continue
        if name in INDEXING and i > 0 and not x.is_floating_point():
            machine.wait_for_stream("copy of an index from the host")
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (argument "
            f"{i} of {op}, {tuple(x.shape)}; {where()})"
        )
    if name in OURS:
        check_ours(name, args)
    masks = (
        [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
        if name in INDEXING
        else []
    )
    if name in WAITING or masks:
        kind = "index by a mask" if masks else "item" if name == "_local_scalar_dense" else name
        machine.wait_for_stream(kind)
    if not captured:
        machine.ran.add(f"{op} {[x.dtype for x in tensors]}")
        return
    if name in RANDOM:
        machine.problem(f"{op} draws random numbers in a graph: the same in every replay")
    if f"{op} {[x.dtype for x in tensors]}" not in machine.ran:
        machine.problem(f"{op} runs for the first time inside a capture, where it cannot be loaded")


def check_ours(name: str, args: tuple) -> None:
    """Raise the errors of the project's CUDA binding that the CPU binding does not raise."""
    first = next(x for x in args if isinstance(x, Tensor))
    if "attention" in name:
        qkv = args[1] if name.endswith("backward") else first
        if qkv.shape[-1] not in (32, 64, 128) or qkv.dtype == torch.float64:
            raise RuntimeError(
                f"{name}: qkv's head size D must be 32, 64 or 128 on CUDA, not {qkv.shape[-1]}"
            )
        if qkv.data_ptr() % 16:
            raise RuntimeError(f"{name}: qkv must begin at a multiple of 16 bytes")
    if first.dtype == torch.float64:
        raise RuntimeError(f"{name}: no CUDA kernel for float64")
    if name == "token_logprob" and args[3] != 0:
        raise RuntimeError("token_logprob: only the CPU's kernel keeps logits")


def accessed(
    op: Any, name: str, args: tuple, kwargs: dict, on_cpu: Callable
) -> Iterator[tuple[Tensor, bool, Any]]:
    """(CPU tensor, whether it is written, index) of what a kernel touches. Exact for indexing;
    other kernels count as touching all elements of a view."""
    if name in ("index", "index_put_", "_index_put_impl_"):
        index = [on_cpu(i) if isinstance(i, Tensor) and i.is_cuda else i for i in args[1]]
        yield from (
            (on_cpu(i), False, None) for i in args[1] if isinstance(i, Tensor) and i.is_cuda
        )
        yield on_cpu(args[0]), name != "index", index
        if name != "index" and args[2].is_cuda:
            yield on_cpu(args[2]), False, None
        return
    arguments = op._schema.arguments
    named = [
        *zip(arguments, args, strict=False),
        *((a, kwargs[a.name]) for a in arguments if a.name in kwargs),
    ]
    for argument, value in named:
        write = argument.alias_info is not None and argument.alias_info.is_write
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, Tensor) and x.is_cuda:
                yield on_cpu(x), write, None


def implementation(op: Any, name: str) -> Callable:
    """The function of CPU tensors that computes what the CUDA kernel does."""
    if name in RANDOM:
        return lambda *args, **kwargs: with_device_generator(op, args, kwargs)
    if op is aten.mm.dtype:
        return mm_wide
    if op is aten._addmm_activation.default:  # tanh GELU, of the sums before they are rounded
        return lambda bias, a, b, use_gelu=False: torch.nn.functional.gelu(
            bias.float() + a.float() @ b.float(), approximate="tanh"
        ).to(a.dtype)
    if op in (aten._softmax.default, aten._log_softmax.default):
        return lambda x, dim, half_to_float: op(x.float() if half_to_float else x, dim, False)
    return op


def mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def with_device_generator(op: Any, args: tuple, kwargs: dict) -> Any:
    before = torch.get_rng_state()
    torch.set_rng_state(machine.generator.get_state())
    try:
        return op(*args, **kwargs)
    finally:
        machine.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def copy_(to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the host and the device. A copy to pinned memory arrives only when the host
    waits."""
    if to.is_cuda and x.is_cuda:
        run(aten.copy_.default, to, x)
        return to
    host, stream = (x if to.is_cuda else to), device.stream()
    alike = to.dtype == x.dtype and to.shape == x.shape and to.stride() == x.stride()
    direct = non_blocking and alike and host.numel() > 0 and device.is_pinned(host.data_ptr())
    graph = GRAPHS.get(stream) if machine.capturing is not None else None
    alias = device.as_cpu(to if to.is_cuda else x, not graph)
    if graph:
        if not direct:
            machine.refuse_in_capture("copy")
        pair = (alias, x) if to.is_cuda else (to, alias)
        graph.record(aten.copy_.default, (pair, {}), [], [(alias, to.is_cuda, None)])
        return to
    clock = machine.launch("copy")
    machine.access(alias, to.is_cuda, clock)
    if to.is_cuda:
        alias.copy_(x)
        if direct:
            machine.uploads.append((stream, clock[stream], x, as_bytes(x)))
        elif non_blocking:
            machine.waits["copy from pageable memory", where()] += 1
        else:
            machine.wait_for_stream("copy from the host")
    elif direct:
        machine.downloads.append((stream, clock[stream], to, alias.clone()))
        to.view(-1).view(torch.uint8).fill_(0xFF) if to.is_contiguous() else to.fill_(-1)
    else:
        machine.wait_for_stream("copy to the host")
        to.copy_(alias)
    return to
