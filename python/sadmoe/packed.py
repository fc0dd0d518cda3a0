"""Experts as the CPU kernels read them fastest: each expert's neurons side by side in memory."""

from contextlib import ExitStack

from torch import nn

from sadmoe.dial import check_own_weights, converted_layers
from sadmoe.ops import packing_gains


def pack_experts_(model: nn.Module) -> tuple[str, ...]:
    """Lays out the experts of a converted model anew, in place, to run on the CPU; returns the names of the layers that
    are packed now.

    w_up and w_gate keep their shapes [E, s, d], in memory that is [E, d, s]. Nothing takes more of it: one matrix after
    the other is replaced. Packed are those where it was measured to gain: with AVX-512, in experts of a multiple of 32
    neurons, of float32, float16, or without AMX bfloat16. Others stay as they are, so with AVX2 nothing is done, and
    `()` returned.

    Packed layers always run by the op, as with `set_batch_invariant(model, True)`. They sum in another order, so
    results differ by rounding. What is saved, by whatever means but pickling, is laid out as before, and so is a layer
    that moves to another device. Training works, and is slower. Raises ValueError where nothing is converted, or
    weights of a layer are not just its own. Whatever is raised, the model is as it was.
    """
    layers = converted_layers(model)
    check_own_weights(model, layers)
    with ExitStack() as undo:
        for layer in layers.values():
            if not layer.is_packed and packing_gains(layer.w_up):
                undo.callback(layer.unpack_)
                layer.pack_()
        undo.pop_all()
    return tuple(name for name, layer in layers.items() if layer.is_packed)


def unpack_experts_(model: nn.Module) -> None:
    """Undoes `pack_experts_`, in place. Raises ValueError where nothing is converted."""
    for layer in converted_layers(model).values():
        layer.unpack_()
