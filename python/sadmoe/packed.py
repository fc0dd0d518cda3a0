"""Experts as the CPU kernels read them fastest: each expert's neurons side by side in memory."""

from contextlib import ExitStack

from torch import nn

from sadmoe.dial import converted_layers
from sadmoe.ops import packing_gains
from sadmoe.weights import check_own_weights


def pack_experts_(model: nn.Module) -> tuple[str, ...]:
    """Lays out the experts of a converted model anew, in the same parameters, to run on the CPU.

    Returns the names of the layers that are packed now.

    w_up and w_gate keep their shapes [E, s, d], in memory that is [E, d, s], and no more of it: layer after layer is
    replaced, and leaves memory that it shared. Packed are those where it gained on a Zen 5: with AVX-512, in experts of
    a multiple of 32 neurons up to 256. Others, and int8, stay as they are: with AVX2, or AMX, nothing is done, and `()`
    returned.

    Packed layers run by the op at every tau, as with `set_batch_invariant(model, True)`, but for gates on true norms.
    They sum in another order, so results differ by rounding. `save` and `save_pretrained` write them as before, and one
    that moves to another device is unpacked. They are not trained (`unpack_experts_` first); an optimizer that has
    begun with them is none for them any more. Raises ValueError where nothing is converted, or weights of a layer are
    not just its own. Whatever is raised, layers that this call packed are unpacked again.
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
