"""Training on several processes at once: each runs its part of an update's batches, all make the same update.

Whoever launches them (torchrun, accelerate launch) has made the process group; without one there is one process.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def refuse_group(step: str) -> None:
    """Raises RuntimeError in a process group, whose processes would train a step of that name apart."""
    if (world := place()[1]) > 1:
        raise RuntimeError(
            f"{step} trains in one process, and was called in a group of {world}: call it before the group is made, or "
            "in one process that saves the model for the others"
        )


def _in_place(collective: Callable[[Tensor], Any], tensor: Tensor) -> None:
    """The collective, which takes a tensor's memory for one without gaps, on whatever lies there otherwise."""
    # Of what stands for many entries, as an expanded buffer's: itself.
    own = tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]
    whole = own.contiguous()
    collective(whole)
    if whole.data_ptr() != own.data_ptr():
        own.copy_(whole)


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            _in_place(distributed.all_reduce, tensor)


@torch.no_grad()
def as_first_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes what it is in the first process, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            _in_place(partial(distributed.broadcast, src=0), tensor)


@torch.no_grad()
def mean_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its mean over the processes, in place; one that is the same in all stays, bit for bit."""
    if place()[1] > 1:
        for tensor in tensors:
            _in_place(_mean_, tensor)


def _mean_(tensor: Tensor) -> None:
    total = tensor.double()
    bounds = torch.stack([total, -total])
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    if not torch.equal(bounds[0], -bounds[1]):
        distributed.all_reduce(total)
        tensor.copy_(total / place()[1])


def mean_over_processes(value: float, device: torch.device) -> float:
    """The mean of the processes' values."""
    world = place()[1]
    if world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item() / world


def is_same(value: float, device: torch.device) -> bool:
    """Whether all processes have the same value."""
    if place()[1] == 1:
        return True
    bounds = torch.tensor([value, -value], dtype=torch.float64, device=device)
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    return bool(bounds[0] == -bounds[1])


def of_first(value: float, device: torch.device) -> float:
    """The first process's value: clocks differ, and all must stop at the same update."""
    if place()[1] == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return shared.item()
