"""What a model is called with, and calling it.

A *batch* is one call: a Mapping becomes model(**batch), a tuple or list model(*batch), a Tensor model(batch).
*batches* is a collection of them that can be gone through again and again: a list, a DataLoader.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sadmoe.hooks import uncompiled
from sadmoe.modules import device_of, evaluating, is_out_of_memory

Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor
Batches = Iterable[Batch]
REPEATS = 0.01  # relative error of outputs up to which two runs are the same
NOTHING_AGAIN = (
    "batches gave nothing when they were gone through again: pass a list, or a DataLoader whose dataset starts anew "
    "each time"
)


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output on one batch, which must already be on the model's device (see `to_device`)."""
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise TypeError(f"a batch must be a Mapping, a tuple, a list or a Tensor, got {type(batch).__name__}")
    batch = each_tensor(
        batch, lambda tensor: tensor
    )  # in new containers: some models write their answer into them
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "model is a DataParallel, whose copies run in threads, where what layers see gets mixed up: give the model "
            "inside, its .module"
        )
    named = dict(batch) if isinstance(batch, Mapping) else {}
    rest = batch if isinstance(batch, tuple | list) else (batch,) if isinstance(batch, Tensor) else ()
    try:
        return model(*rest, **named)
    except (TypeError, AttributeError) as error:
        if told := _no_tensors(named.items() or enumerate(rest)):
            raise TypeError(f"a {type(model).__name__} cannot run the batch ({error}): {told}") from error
        if not isinstance(error, TypeError) or not _raised_by_the_call(error):
            raise
        raise TypeError(
            f"a {type(model).__name__} cannot be called with the batch, {_said(batch)}: {error}. A batch is what the "
            "model is called with, without labels that it does not take"
        ) from error


def check_repeats(once: Iterable[Tensor], again: Iterable[Tensor], whose: str) -> None:
    """Raises ValueError where what two runs on the same batch gave differs by more than rounding."""
    one, other = list(once), list(again)
    same = len(one) == len(other) and all(
        a.shape == b.shape and not (a.float() - b.float()).norm() > REPEATS * a.float().norm()
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        raise ValueError(
            f"{whose} gives other outputs when it runs on the same batch again, so that nothing can be held to them: "
            "it draws random numbers in evaluation, too. Put what it draws into the batches (ViTMAE: noise)"
        )


def _raised_by_the_call(error: TypeError) -> bool:
    """Whether it is the call of a forward that failed, and nothing in it."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_code is nn.Module._call_impl.__code__


def _no_tensors(parts: Iterable[tuple[Any, Any]]) -> str | None:
    """Of numbers that are in no tensor, in which part of a batch they are and what to do; None where there are none."""
    for key, value in parts:
        leaves = tree_leaves(value)
        if any(isinstance(leaf, np.ndarray) for leaf in leaves):
            return f"{key!r} holds a numpy.ndarray: give torch.as_tensor of it"
        if isinstance(value, list) and leaves and all(type(leaf) in (int, float) for leaf in leaves):
            return (
                f"{key!r} is a list of numbers, perhaps where a tensor is meant: tokenizers and processors give those "
                'by return_tensors="pt"'
            )
    return None


def _said(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(str, batch)) or 'nothing'}"
    return "a tensor" if isinstance(batch, Tensor) else f"a {type(batch).__name__} of {len(batch)}"


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor inside it on `device`; what is no tensor stays as it is. A kind of dict of its own
    (BatchEncoding, ModelOutput) stays of that kind, any other mapping becomes a dict."""
    return each_tensor(batch, lambda tensor: tensor.to(device))


def each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch, in new containers, with what the change makes of every tensor inside it."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        moved = {key: each_tensor(value, change) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, dict | UserDict):
            return moved
        same = copy.copy(batch)
        for key, value in moved.items():  # a ModelOutput refuses `update`
            same[key] = value
        return same
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each_tensor(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(each_tensor(value, change) for value in batch)
    return batch


def bare(batch: Batch | None) -> Any:
    """What a tuple of one holds, as the batches of a SentenceTransformer, or the mapping that one begins with, beside
    what a loss compares with; else the batch."""
    if isinstance(batch, tuple | list) and batch and (len(batch) == 1 or isinstance(batch[0], Mapping)):
        return batch[0]
    return batch


def samples_in(batch: Batch) -> int:
    """How many samples a batch holds: the first dimension of its first tensor that has one, else 1. Of mappings in a
    mapping, where it holds no tensor itself."""
    batch = bare(batch)
    several = batch if isinstance(batch, tuple | list) else [batch]
    values = list(batch.values() if isinstance(batch, Mapping) else several)
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return next((samples_in(value) for value in values if isinstance(value, Mapping)), 1)


def check_batches(batches: Batches) -> None:
    """Raises TypeError or ValueError unless `batches` holds batches and can be gone through again."""
    if isinstance(batches, Mapping | Tensor | str | bytes):
        raise TypeError(
            f"batches must be a list or a DataLoader of batches, got one {type(batches).__name__}: "
            "wrap it in a list"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list or a DataLoader of batches, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be re-iterable, got the one-shot iterator {type(batches).__name__}: "
            "pass list(batches), or a DataLoader"
        )
    if length(batches) == 0:
        raise ValueError("batches must hold at least one batch, got an empty collection")


def length(batches: Batches) -> int | None:
    """How many batches there are, None where the collection does not say."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # also what a DataLoader over an IterableDataset raises
        return None


def check_runs(model: nn.Module, batches: Batches, changed: str, config: str) -> None:
    """Raises NotImplementedError where the model does not run as changed: a part was used as none of its kind can be.
    ValueError where there is no batch left to run it on. config: whose filter leaves parts out."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError(NOTHING_AGAIN)
    with uncompiled(), evaluating(model):
        try:
            run(model, to_device(batch, device_of(model)))
        except Exception as error:  # whatever a foreign forward raises; it ran the same batch before
            if is_out_of_memory(error):
                raise
            raise NotImplementedError(
                f"this {type(model).__name__} does not run with {changed}: {type(error).__name__}: {error}; leave out "
                f"those that it is about by {config}(filter=...)"
            ) from error


def settle(model: nn.Module, batches: Batches) -> None:
    """One batch without gradients, before a model is trained in evaluation mode: what it keeps from its first pass
    there, such as the attention biases of timm's TinyViT and EfficientFormer, then holds on to no graph."""
    for batch in islice(batches, 1):
        with torch.no_grad():
            run(model, to_device(batch, device_of(model)))
