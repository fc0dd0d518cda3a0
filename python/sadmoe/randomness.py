"""Random numbers, of torch, NumPy and Python, that start from a seed and come back as they were."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

SEED = 0  # of the order in which a DataLoader shuffles, the same in every pass that measures


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[list[int]]:
    """The random state, torch's on the CPU and where the model is, NumPy's and Python's, starts from `seed`; afterwards
    it is what it was. Yields the CUDA devices."""
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    before = _states()
    with torch.random.fork_rng(devices):
        _seed(devices, seed)
        try:
            yield devices
        finally:
            _set_states(before)


@contextmanager
def random_numbers_kept(tensor: Tensor) -> Iterator[None]:
    """The user's random numbers stay as they are, though weights are drawn inside, where the tensor is."""
    with torch.random.fork_rng([tensor.device] if tensor.is_cuda else []):
        yield


def reseed(cuda_devices: Sequence[int], seed: int, number: int) -> None:
    """Random numbers, on the CPU and those devices, go on as those of that batch."""
    _seed(cuda_devices, (seed + (number + 1) * 0x9E3779B9) % 2**32)


def _seed(cuda_devices: Sequence[int], seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
    for index in cuda_devices:
        torch.cuda.default_generators[index].manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _states() -> tuple[Any, ...]:
    """Of the CPU's random numbers: torch's, NumPy's and Python's."""
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, ...]) -> None:
    of_torch, of_numpy, of_python = states
    torch.set_rng_state(of_torch)
    numpy.random.set_state(of_numpy)
    random.setstate(of_python)


class Apart:
    """A context in which the CPU's random numbers are a sequence of its own, which goes on from entry to entry."""

    def __init__(self, seed: int):
        before = _states()
        _seed((), seed)
        self.states = _states()
        _set_states(before)

    def __enter__(self) -> None:
        self.outside = _states()
        _set_states(self.states)

    def __exit__(self, *exception: object) -> None:
        self.states = _states()
        _set_states(self.outside)
