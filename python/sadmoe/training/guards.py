"""What training a model in place must give back if it fails."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sadmoe.undo import snapshot


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """On any exception the model's modules hold what they did, activations, configs and gates too, and its tensors are
    what they were."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    put_back = snapshot(model)
    try:
        yield
    except BaseException:
        put_back()
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                put_in(tensor, value)
        torch.clear_autocast_cache()  # an autocast around it keeps casts of what was there
        raise
    finally:
        model.zero_grad(set_to_none=True)


def put_in(tensor: Tensor, value: Tensor) -> None:
    """Writes it, but for a tensor of which positions share memory (an expanded buffer): no training can write that."""
    steps = tensor.stride() if tensor.layout == torch.strided else ()
    if all(n <= 1 or step for n, step in zip(tensor.shape, steps, strict=False)):
        tensor.copy_(value)
