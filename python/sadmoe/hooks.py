"""Hooks on modules that come off again."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

M = TypeVar("M", bound=torch.nn.Module)


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled modules run uncompiled, in the whole process: compiled code would ignore hooks that were added
    since. Not to be entered from compiled code."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def takes_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks can be put on it: not where it is scripted."""
    return not isinstance(module, torch.jit.ScriptModule)


@contextmanager
def hooks_on(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks are on their modules. Where one of a generator cannot be put there, the others come off."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def calls_seen(
    modules: Mapping[str, M], see: Callable[[str, M, tuple[Any, ...], dict[str, Any]], None]
) -> AbstractContextManager[None]:
    """Inside, see(name, module, args, kwargs) comes before every call of one of these modules."""
    return hooks_on(
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for name, module in modules.items()
    )
