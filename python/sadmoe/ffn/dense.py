"""The FFN as a value, and its two ways: into a DynamicKMoE and back."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sadmoe import reference
from sadmoe.checks import check_choice
from sadmoe.gates import Gate
from sadmoe.layer import SCALES, DynamicKMoE
from sadmoe.tables import divisors

TENSORS = ("w_up", "w_down", "b_up", "w_gate", "b_gate", "b_out")


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one FFN of f neurons, one neuron a row, whatever module holds them.

    Plain: act(x w_upᵀ + b_up) w_down + b_out.
    GLU: (act(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up)) w_down + b_out.
    w_up, w_gate [f, d]; w_down [f, d_out], the transpose of torch's Linear weight.
    b_up, b_gate [f]; b_out [d_out].   act: a key of `reference.ACTIVATIONS`.
    dropout: probability on the output, in training.
    trainable: which of the tensors (by field name) require a gradient; the tensors themselves are detached.
    """

    act: str
    w_up: Tensor
    w_down: Tensor
    b_up: Tensor | None = None
    w_gate: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None
    dropout: float = 0.0
    trainable: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_choice("act", self.act, reference.ACTIVATIONS)
        if self.w_up.dim() != 2 or self.w_down.dim() != 2:
            raise ValueError(
                f"w_up must be [f, d] and w_down [f, d_out], got {list(self.w_up.shape)} "
                f"and {list(self.w_down.shape)}"
            )
        f, d = self.w_up.shape
        expected = {
            "w_down": (f, self.d_out),
            "b_up": (f,),
            "w_gate": (f, d),
            "b_gate": (f,),
            "b_out": (self.d_out,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {list(shape)} beside w_up {[f, d]}, got {list(tensor.shape)}"
                )
        if self.b_gate is not None and self.w_gate is None:
            raise ValueError("b_gate needs w_gate, got b_gate alone")

    @property
    def d(self) -> int:
        """Width of the input."""
        return self.w_up.shape[1]

    @property
    def f(self) -> int:
        """Neurons."""
        return self.w_up.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.w_down.shape[1]

    @property
    def gated(self) -> bool:
        """Whether it is a GLU."""
        return self.w_gate is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights and biases by field name, without those that are None."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    def to(self, where: torch.dtype | str) -> "DenseFFN":
        """The same FFN with weights of another dtype, or on another device."""
        moved: dict[str, Any] = {name: t.to(where) for name, t in self.tensors.items()}
        return replace(self, **moved)

    @property
    def first(self) -> Tensor:
        """[f, d]: the weights that the activation sees, of the gate in a GLU: by them the paper clusters neurons."""
        return self.w_up if self.w_gate is None else self.w_gate

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of the neurons: x [..., d] -> [..., f]."""
        act = reference.ACTIVATIONS[self.act]
        up = F.linear(x, self.w_up, self.b_up)
        return act(up) if self.w_gate is None else act(F.linear(x, self.w_gate, self.b_gate)) * up

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d_out], as in evaluation: without dropout."""
        y = self.hidden(x) @ self.w_down
        return y if self.b_out is None else y + self.b_out


def layer_from_dense(
    dense: DenseFFN, slots: Tensor, experts: int, router_width: int = 128, gate: Gate | None = None
) -> DynamicKMoE:
    """The FFN cut into experts: slot j of the layer holds neuron slots[j] (arXiv 2310.04361, section 3).

    Weights are copied once, permuted, with dense's dtype, device and requires_grad; the router starts
    untrained. slots: int64 [f], a permutation of the neurons; expert e has slots e * f/experts to (e + 1) *
    f/experts - 1. On the meta device only the shapes are made. Raises ValueError where experts does not
    divide f or slots is no permutation.
    """
    f, device = dense.f, dense.w_up.device
    if experts < 1 or f % experts:
        raise ValueError(
            f"experts must divide the {f} neurons of the FFN, got {experts}; these do: {divisors(f)}"
        )
    if slots.shape != (f,) or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [{f}], got {slots.dtype} {list(slots.shape)}")
    slots = slots.to(device)
    if not slots.is_meta and not torch.equal(slots.sort().values, torch.arange(f, device=device)):
        raise ValueError(f"slots must hold each of the neurons 0 to {f - 1} once")
    layer = DynamicKMoE(
        dense.d,
        experts,
        f // experts,
        dense.act,
        router_width=router_width,
        d_out=dense.d_out,
        gated=dense.gated,
        bias=tuple(b for b in ("b_up", "b_gate", "b_out") if getattr(dense, b) is not None),
        dropout=dense.dropout,
        gate=gate,
        device=device,
        dtype=dense.w_up.dtype,
    )
    with torch.no_grad():
        for name in TENSORS:
            source, target = getattr(dense, name), getattr(layer, name)
            if source is not None:
                target.copy_(source if name == "b_out" else source[slots].view_as(target))
                target.requires_grad_(name in dense.trainable)
        layer.permutation.copy_(slots)
    return layer


def dense_from_layer(layer: DynamicKMoE) -> DenseFFN:
    """The FFN of the layer as copies, its neurons in the order they had before `layer_from_dense`. Raises ValueError
    where that order is lost, as by an average over buffers."""
    slots = layer.permutation
    if not torch.equal(slots.sort().values, torch.arange(len(slots), device=slots.device)):
        raise ValueError(
            "permutation, the order of the layer's neurons, is none: it must not be trained, averaged (an average of "
            "models with its buffers) or cast; load it again from the model's file"
        )
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        weight = getattr(layer, name)
        if weight is None or name == "b_out":
            tensors[name] = None if weight is None else weight.detach().clone()
        else:
            weight = layer.float_weights(name) if name in SCALES else weight
            rows = weight.detach().flatten(0, 1)
            tensors[name] = torch.empty_like(rows).index_copy_(0, slots, rows)
    trainable = frozenset(n for n in TENSORS if layer.trains(n))
    dropout = 0.0 if layer.dropout is None else layer.dropout.p
    return DenseFFN(act=layer.act, dropout=dropout, trainable=trainable, **tensors)
