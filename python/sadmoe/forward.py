"""What a forward pass runs under."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, nothing on the device is cast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def no_gradient(what: str = "for the penalty") -> RuntimeError:
    """Of a forward pass that should have left one."""
    return RuntimeError(
        f"the forward pass left no gradient {what}: it ran under no_grad, or with reentrant checkpointing (set "
        "gradient_checkpointing_kwargs={'use_reentrant': False})"
    )


def is_recomputed() -> bool:
    """Whether this forward is that of gradient checkpointing, run again in backward: hooks that record have seen it."""
    return torch._C._current_graph_task_id() != -1
