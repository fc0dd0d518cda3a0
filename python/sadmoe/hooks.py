"""Hooks on modules that come off again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooks_on(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks are on their modules. Where one of a generator cannot be put there, the others come off."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
