"""The converted layers of a model, and the one number they share."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sadmoe.ffn import moe_layers
from sadmoe.gates import DynamicK
from sadmoe.layer import DynamicKMoE


def converted_layers(model: nn.Module) -> dict[str, DynamicKMoE]:
    """The converted layers by name, in the model's order. Raises ValueError where there is none."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no converted layer: convert it first, see convert_"
        )
    return layers


def set_tau(model: nn.Module, tau: float) -> None:
    """Every converted layer runs expert e for token t iff scores[t, e] >= tau * max(scores[t]).

    tau in [0, 1]: 0 is the dense model, 1 the top expert of every token. Takes effect at the next call,
    without a reload. A gate on true norms (the oracle) stays one; a static top-k gate becomes dynamic-k.
    Raises ValueError where tau is out of range or nothing was converted.
    """
    for layer in converted_layers(model).values():
        layer.gate = DynamicK(tau, layer.gate.true_norms)


@contextmanager
def tau(model: nn.Module, value: float) -> Iterator[None]:
    """`set_tau` for a with block; every layer's former gate comes back, whatever happens inside."""
    gates = [(layer, layer.gate) for layer in converted_layers(model).values()]
    set_tau(model, value)
    try:
        yield
    finally:
        for layer, gate in gates:
            layer.gate = gate
