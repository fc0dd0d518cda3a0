"""The converted layers of a model, and what they share: the one number, and what a token may depend on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from sadmoe.checks import Filter, check_filter, check_number
from sadmoe.ffn import moe_layers
from sadmoe.gates import DynamicK, Gate
from sadmoe.layer import DynamicKMoE

Taus = float | Mapping[str, float]  # one for all converted layers, or each one's by its name


def converted_layers(model: nn.Module, filter: Filter | None = None) -> dict[str, DynamicKMoE]:
    """The converted layers by name, in the model's order. Raises ValueError where there is none."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no converted layer: convert it first, by convert_ or `sadmoe convert`"
        )
    check_filter(filter)
    chosen = {name: layer for name, layer in layers.items() if filter is None or filter(name)}
    if not chosen:
        raise ValueError(f"filter refused all {len(layers)} converted layers: {', '.join(layers)}")
    return chosen


def trainable_layers(model: nn.Module) -> dict[str, DynamicKMoE]:
    """The same, of which none may have experts in int8, nor packed.

    Checkpoints keep an optimizer's moments in rows, and a fused one would take packed weights for rows, too.
    """
    layers = converted_layers(model)
    for name, layer in layers.items():
        if layer.is_int8:
            raise ValueError(
                f"the experts of {name} are int8 and cannot be trained: dequantize_experts_(model) first"
            )
        if layer.is_packed:
            raise ValueError(f"the experts of {name} are packed, to run only: unpack_experts_(model) first")
    return layers


def gates_of(layers: Mapping[str, DynamicKMoE]) -> dict[str, Gate]:
    """The gate of each layer, by its name."""
    return {name: layer.gate for name, layer in layers.items()}


def set_gates(layers: Mapping[str, DynamicKMoE], gates: Mapping[str, Gate]) -> None:
    """Gives each layer the gate of its name."""
    for name, layer in layers.items():
        layer.gate = gates[name]


def set_tau(model: nn.Module, tau: Taus, *, filter: Filter | None = None) -> None:
    """Every converted layer runs expert e for token t iff scores[t, e] >= tau * max(scores[t]).

    tau in [0, 1]: 0 runs every expert, 1 the top expert of every token. A mapping gives every converted layer its own,
    by name. filter: of a layer's name, False leaves its gate as it is. Takes effect at the next call, without a
    reload. A gate on true norms (the oracle) stays one; a static top-k gate becomes dynamic-k.
    Raises ValueError where tau is out of range, layers are missing or unknown, or nothing was converted; then nothing
    was set.
    """
    layers = converted_layers(model, filter)
    by_name = tau if isinstance(tau, Mapping) else dict.fromkeys(layers, tau)
    if by_name.keys() != layers.keys():
        kinds = {"missing": layers.keys() - by_name.keys(), "unknown": by_name.keys() - layers.keys()}
        wrong = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)
        raise ValueError(f"tau must name each converted layer that it is for, and no other; {wrong}")
    set_gates(
        layers, {name: DynamicK(by_name[name], layer.gate.true_norms) for name, layer in layers.items()}
    )


def set_batch_invariant(model: nn.Module, value: bool | None, *, expected_share: float | None = None) -> None:
    """Whether a token's bits must not depend on other tokens, in every converted layer: see `DynamicKMoE`.

    True: they never do. None, the default: they may in 16 bits, where dense products are over 10 % faster (CUDA: 5 %,
    and without expected_share at any share), and at tau = 0. False: wherever those are faster. expected_share: the
    executed share in [0, 1] that decides on CUDA in place of that of earlier calls, such as calibration found; what was
    set before goes. Takes effect at the next call; not saved with the model. Raises TypeError where value is none of
    these, ValueError where expected_share is out of range or nothing was converted.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"value must be True, False or None, got {value!r}")
    if expected_share is not None:
        check_number("expected_share", expected_share, " in [0, 1]")
    if expected_share is not None and not 0.0 <= expected_share <= 1.0:
        raise ValueError(f"expected_share must be in [0, 1], got {expected_share}")
    for layer in converted_layers(model).values():
        layer.batch_invariant, layer.expected_share = value, expected_share


@contextmanager
def tau(model: nn.Module, tau: Taus, *, filter: Filter | None = None) -> Iterator[None]:
    """`set_tau` for a with block; every layer's former gate comes back, whatever happens inside.

    Call backward() inside it, too, where blocks are checkpointed: they then run again, by the gates of that moment.
    """
    layers = converted_layers(model, filter)
    former = gates_of(layers)
    set_tau(model, tau, filter=filter)
    try:
        yield
    finally:
        set_gates(layers, former)
