"""Changing the modules of a model so that a failure leaves nothing behind."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Called with a model whose FFNs were converted, loaded or restored, so that what describes it can follow.
after_surgery: list[Callable[[nn.Module], None]] = []


@contextmanager
def surgery(model: nn.Module) -> Iterator[None]:
    """A with block that may change which modules and parameters a model has: all of it happens, or nothing.

    Whatever is raised in it, KeyboardInterrupt included, every module has its former children, parameters,
    buffers, hooks, flags and other attributes again: the same objects. Tensors are not copied, so the block
    must not write to them. It is out of torch.inference_mode, whose tensors can never be trained.
    """
    put_back = snapshot(model)
    try:
        with torch.inference_mode(False):
            yield
        _tell(model)
    except BaseException:
        put_back()
        _tell(model)
        raise


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module of the model what it holds now: attributes, and what is in its mappings."""
    tables = {key for key, value in nn.Module().__dict__.items() if isinstance(value, dict)}
    saved = [
        (
            module,
            dict(module.__dict__),
            {
                key: dict(value)
                for key, value in module.__dict__.items()  # of a scripted module these are no dicts
                if isinstance(value, dict) and (key in tables or type(value) in (dict, OrderedDict))
            },
        )
        for module in model.modules()
    ]

    def put_back() -> None:
        for module, attributes, mappings in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            # In place: the handle of a hook knows its table, not its module. No mappings of other types, such as an
            # output that a model keeps: they may refuse it, and hold nothing of torch's.
            for key, former in mappings.items():
                attributes[key].clear()
                attributes[key].update(former)

    return put_back


def _tell(model: nn.Module) -> None:
    for listener in after_surgery:
        listener(model)
