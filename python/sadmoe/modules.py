"""What a model is beside its layers: wrappers around it, its device, its mode, what it returns."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # the one child of torch.compile's and of checkpoint's


def check_model(model: Any, called: str = "model") -> None:
    """Raises TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{called} must be a torch.nn.Module, got {type(model).__name__}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is of a lack of memory; torch's on the CPU, and its threads', have no class of their own."""
    told = isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("allocate memory", "bad_alloc")
    )
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def refuse_compiled(model: nn.Module, called: str = "model") -> None:
    """Raises ValueError where the model, or a part, was compiled: it then bypasses its modules' hooks."""
    check_model(model, called)
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or called}: is compiled, so its modules are not seen while it runs; pass the model as it was "
                "before torch.compile, and compile afterwards"
            )


def refuse_distributed(model: nn.Module) -> None:
    """Raises ValueError where gradients are shared by hooks on the parameters that the model has."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'model'} is a DistributedDataParallel, which goes on sharing the gradients of the weights "
                "that it has: give the model inside, its .module, and wrap it afterwards"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The original module of one in `WRAPPERS`; any other model as it is."""
    for name in WRAPPERS:
        if name in model._modules:
            return unwrapped(model._modules[name])  # type: ignore[arg-type]
    return model


def innermost(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DataParallel and DistributedDataParallel made of it; another as it is."""
    while isinstance(model := unwrapped(model), nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def plain_name(name: str) -> str:
    """The path of a module or tensor as it was before parts of the model were wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the config of the model, or of one inside it, says encoder-decoder, and a decoder is really there: an
    encoder that was taken out of such a model still has the whole model's config."""
    return any(
        name.endswith("decoder")
        for m in model.modules()
        if getattr(getattr(m, "config", None), "is_encoder_decoder", False) is True
        for name, _ in m.named_modules()
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter or buffer, else the CPU. Of one that
    accelerate offloaded, where accelerate runs it."""
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is not None and first.is_meta:
        for module in model.modules():
            hook = getattr(module, "_hf_hook", None)
            if (runs_on := getattr(hook, "execution_device", None)) is not None:
                return torch.device(runs_on)
    return torch.device("cpu") if first is None else first.device


def floats_in(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned, of tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif is_dataclass(output):
        parts = (getattr(output, field.name) for field in fields(output))
    else:
        parts = output if isinstance(output, tuple | list) else ()
    for part in parts:
        yield from floats_in(part)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's training flag is what it was."""
    with mode(model, train=False), torch.no_grad():
        yield


@contextmanager
def mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Every module in training (or evaluation) mode; afterwards each is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(train)
        yield
    finally:
        for module, flag in flags:
            if module.training != flag and type(module).train is not nn.Module.train:
                module.train(flag)  # it may do more: take an adapter out of a weight again
        for module, flag in flags:
            module.training = flag
