"""How a Python function calls its op: past rules that the call does not need, or by plain torch."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sadmoe import reference
from sadmoe.ops.autocast import ARGUMENTS, cast_all

# Every op, by name, in plain torch, and the same with a warning: `fallback` fills them.
BY_TORCH: dict[str, Callable[..., Tensor]] = {}
WITH_WARNING: dict[str, Callable[..., Tensor]] = {}
OLDEST = (8, 0)  # compute capability of a GPU that kernels are built for


def run(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """The op; without gradients, past its rule for them.

    The rule is Python: with cold caches, to enter it only to learn that no gradient is wanted takes longer than a
    kernel with one token. Plain torch, which computes every expert, runs instead inside the transforms of torch.func
    and, outside graphs of torch.compile, with forward-mode gradients and on GPUs that are older than the kernels.
    """
    if torch._C._are_functorch_transforms_active():
        return _in_plain_torch(op, args, BY_TORCH)
    if torch.compiler.is_compiling():
        return op(*args)
    if forward_ad._current_level >= 0:
        return _in_plain_torch(op, args, BY_TORCH)
    if lacks_kernels(args[0]):
        return _in_plain_torch(op, args, WITH_WARNING)
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():  # which has no rules
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def lacks_kernels(x: Tensor) -> bool:
    """Whether x is on a GPU that the kernels, which were built, do not run on; were they not, the op finds its way."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda and is_too_old(x.device)


@lru_cache
def is_too_old(device: torch.device) -> bool:
    """Whether kernels were built for CUDA, and that CUDA device is older than they are."""
    return _built_for_cuda() and torch.cuda.get_device_capability(device) < OLDEST


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels were built for CUDA, and that CUDA device is not older than they are."""
    return _built_for_cuda() and not is_too_old(device)


def _built_for_cuda() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("sadmoe::sparse_experts", "CUDA")


def check_values(name: str, args: Iterable[Any]) -> None:
    """Raises RuntimeError, as kernels do, where tau is out of range, or act unknown."""
    for value in args:
        if isinstance(value, str) and value not in reference.ACTIVATIONS:
            raise RuntimeError(
                f"{name}: act must be one of {', '.join(reference.ACTIVATIONS)}, got {value!r}"
            )
        if isinstance(value, float | int) and not 0 <= value <= 1:
            raise RuntimeError(
                f"{name}: tau must be in [0, 1] (0: every expert, 1: the top expert), got {value}"
            )


def check_devices(*arguments: Any) -> None:
    """Raises RuntimeError where they are on several devices. With one tensor on meta, torch would only infer shapes,
    and return memory that no kernel wrote; with one on a device without kernels, it would run plain torch."""
    devices = {str(value.device) for value in arguments if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(
            f"all tensors of an op of sadmoe must be on one device, got {' and '.join(sorted(devices))}"
        )


def _in_plain_torch(
    op: torch._ops.OpOverload, args: tuple[Any, ...], functions: dict[str, Callable[..., Tensor]]
) -> Tensor:
    """The op by `reference`, tau and act checked, and tensors cast, as the op does."""
    name, device = op._opname, args[0].device.type
    check_values(name, args)
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return functions[name](*args)
    with torch.autocast(device, enabled=False):
        return functions[name](*(cast_all(name, args, device) if name in ARGUMENTS else args))
