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


class LatestCall:
    """What a model was last called with by name, inside its `with`.

    given: the mapping that came first, else the named arguments; None of a call without any, or before the first.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.given: Mapping[str, Any] | None = None
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> "LatestCall":
        self._hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.given = None
        if self._hook is not None:
            self._hook.remove()

    def _see(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = args[0] if args and isinstance(args[0], Mapping) else kwargs or None


def calls_seen(
    modules: Mapping[str, M], see: Callable[[str, M, tuple[Any, ...], dict[str, Any]], None]
) -> AbstractContextManager[None]:
    """Inside, see(name, module, args, kwargs) comes before every call of one of these modules."""
    return hooks_on(
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for name, module in modules.items()
    )
