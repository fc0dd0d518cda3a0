"""Training on several processes at once: each runs its part of an update's batches, all make the same update.

Whoever launches them (torchrun, accelerate launch) has made the process group; without one there is one process.
"""

from collections.abc import Iterable

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


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


@torch.no_grad()
def as_first_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes what it is in the first process, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@torch.no_grad()
def mean_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its mean over the processes, in place; one that is the same in all stays, bit for bit."""
    world = place()[1]
    if world == 1:
        return
    for tensor in tensors:
        total = tensor.double()
        bounds = torch.stack([total, -total])
        distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
        if not torch.equal(bounds[0], -bounds[1]):
            distributed.all_reduce(total)
            tensor.copy_(total / world)


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
