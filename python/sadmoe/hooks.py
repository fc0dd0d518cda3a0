"""Hooks on modules that come off again."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


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
