"""The experts: what a dense FFN became, and what is computed of it for a choice that somebody else made."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sadmoe import ops, reference
from sadmoe.checks import check_choice
from sadmoe.forward import without_autocast
from sadmoe.layer.held import held
from sadmoe.layer.rounding import column_scales, to_int8

SCALES = {"w_up": "scale_up", "w_gate": "scale_gate", "w_down": "scale_down"}  # of weights in int8
WAY_IN = ("w_up", "w_gate")  # what `pack_` lays out
ALL_SCALES = (*SCALES.values(), "scale_out")
Maybe = Tensor | None
Int8Weights = tuple[Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]
LARGE = 128  # neurons from which an expert costs the op no less per neuron: `op_on_all` joins smaller ones up to it
NORM_FLOOR = 1e-12  # norms below it are 0: what rounding leaves of a silent expert


class Experts(nn.Module):
    """The neurons of a dense FFN, cut into E experts of s.

    w_up, w_gate [E, s, d]; w_down [E, s, d_out]; b_up, b_gate [E, s]; b_out [d_out]; permutation [E * s]: the neuron
    of the dense FFN that each slot holds.

    After `to_int8_`, w_up, w_gate and w_down are int8 and stand for themselves times scale_up, scale_gate and
    scale_down [E, s], and w_down's columns times scale_out [d_out]; else those are None.

    After `pack_`, w_up and w_gate are [E, d, s] in memory; `state_dict()` then has copies of them that are not.
    """

    w_up: nn.Parameter
    w_down: nn.Parameter
    w_gate: nn.Parameter | None
    b_up: nn.Parameter | None
    b_gate: nn.Parameter | None
    b_out: nn.Parameter | None
    permutation: Tensor
    scale_up: Tensor | None
    scale_gate: Tensor | None
    scale_down: Tensor | None
    scale_out: Tensor | None

    def __init__(
        self,
        d: int,
        experts: int,
        expert_size: int,
        act: str,
        *,
        d_out: int | None = None,
        gated: bool = False,
        bias: Collection[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """bias: which of "b_up", "b_gate", "b_out" exist. Weights start uninitialised: they are copied or loaded."""
        super().__init__()
        check_choice("act", act, reference.ACTIVATIONS)
        unknown = set(bias) - {"b_up", "b_gate", "b_out"}
        if unknown:
            raise ValueError(f"bias may name b_up, b_gate and b_out, got {', '.join(sorted(unknown))}")
        d_out = d if d_out is None else d_out
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        shapes = {
            "w_up": (experts, expert_size, d),
            "w_down": (experts, expert_size, d_out),
            "w_gate": (experts, expert_size, d) if gated else None,
            "b_up": (experts, expert_size) if "b_up" in bias else None,
            "b_gate": (experts, expert_size) if "b_gate" in bias else None,
            "b_out": (d_out,) if "b_out" in bias else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **kw)))
        self.register_buffer("permutation", torch.arange(experts * expert_size, device=device))
        for name in ALL_SCALES:
            self.register_buffer(name, None)
        # Of the weights in int8, those that would not be trained as floats.
        self._frozen: frozenset[str] = frozenset()
        self.act = act

    @property
    def experts(self) -> int:
        return held(self, "w_up").shape[0]

    @property
    def expert_size(self) -> int:
        return held(self, "w_up").shape[1]

    @property
    def is_int8(self) -> bool:
        """Whether the experts' weights are int8, with scales."""
        return self._buffers["scale_up"] is not None  # every call asks: as an attribute it would take 1 µs

    @property
    def is_packed(self) -> bool:
        """Whether each expert's neurons stand side by side in memory, see `pack_`."""
        first = self._parameters.get("w_up")
        if first is None or first.stride(1) != 1:  # every call asks, and mostly it is not
            return False
        weights = self._way_in()
        return len(weights) > 0 and all(weight.stride(1) == 1 < weight.stride(2) for weight in weights)

    def expert_weights(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """w_up, w_down, b_up, w_gate, b_gate, b_out: the order of the ops."""
        w_up, w_down, b_up = held(self, "w_up"), held(self, "w_down"), held(self, "b_up")
        return w_up, w_down, b_up, held(self, "w_gate"), held(self, "b_gate"), held(self, "b_out")

    def int8_weights(self) -> Int8Weights:
        """The same with scales, in the order of the ops of int8; only where they are int8."""
        w_up, w_down, b_up, w_gate, b_gate, b_out = self.expert_weights()
        scale_up, scale_gate, scale_down, scale_out = map(self._buffers.__getitem__, ALL_SCALES)
        assert scale_up is not None
        assert scale_down is not None
        return w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out

    def float_weights(self, name: str) -> Tensor:
        """w_up, w_down or, of a GLU, w_gate as floats, by name: the parameter itself, or what int8 stands for."""
        weight, scale = held(self, name), self._buffers[SCALES[name]]
        columns = self._buffers["scale_out"] if name == "w_down" else None
        return weight if scale is None else reference.dequantized(weight, scale, scale.dtype, columns)

    def trains(self, name: str) -> bool:
        """Whether a parameter, by name, requires a gradient; of weights in int8, whether they would as floats."""
        if self.is_int8 and name in SCALES:
            return getattr(self, name) is not None and name not in self._frozen
        parameter = getattr(self, name)
        return parameter is not None and parameter.requires_grad

    @torch.no_grad()
    def to_int8_(self) -> None:
        """Rounds the experts' weights to int8, in place: 127 steps to each side of 0 up to a neuron's largest weight.

        w_down is first divided by a scale for each column, a power of two, as some features of a transformer are many
        times larger than the others, of which steps as large would leave little.

        Scales are rounded up to what bfloat16 holds, so casting to it loses nothing of them, nor to float16 down to
        scales of 2 ** -17. Raises ValueError where the experts are int8 already.
        """
        if self.is_int8:
            raise ValueError("the experts are int8 already")
        # All of it before the layer is changed, for there may be no memory for it.
        made: dict[str, Tensor] = {}
        for name, scale_name in SCALES.items():
            weight = getattr(self, name)
            if weight is None:
                continue
            rows = weight.float()
            if name == "w_down":
                made["scale_out"] = column_scales(rows).to(weight.dtype)
                rows = rows / made["scale_out"].float()
            steps, made[scale_name] = to_int8(rows, weight.dtype)
            made[name] = nn.Parameter(steps.contiguous(), requires_grad=False)
        self._frozen = frozenset(name for name in SCALES if not self.trains(name))
        for name, value in made.items():
            setattr(self, name, value)

    @torch.no_grad()
    def to_float_(self) -> None:
        """Undoes `to_int8_`, in place, but for its rounding. Raises ValueError where the experts are not int8."""
        if not self.is_int8:
            raise ValueError("the experts are not int8")
        made = {
            name: nn.Parameter(self.float_weights(name), name not in self._frozen)
            for name in SCALES
            if getattr(self, name) is not None
        }
        for name, weight in made.items():
            setattr(self, name, weight)
        for scale_name in ALL_SCALES:
            setattr(self, scale_name, None)

    @torch.inference_mode(False)
    def pack_(self) -> None:
        """Lays w_up and w_gate [E, s, d] out as [E, d, s], as the CPU kernels read them fastest.

        Not where one of them is made of others at every access, as by torch's parametrize and prune; use these first.
        """
        weights = self._way_in()
        for weight, laid_out in zip(weights, [ops.packed(weight.data) for weight in weights], strict=True):
            weight.data = laid_out

    @torch.inference_mode(False)
    def unpack_(self) -> None:
        """Undoes `pack_`."""
        for name in WAY_IN:
            weight = self._parameters.get(name)
            if weight is not None and not weight.is_contiguous():
                weight.data = weight.data.contiguous()

    def _way_in(self) -> list[nn.Parameter]:
        """w_up and, of a GLU, w_gate; none of them where one is no parameter of this module."""
        table = self._parameters
        if any(name not in table for name in WAY_IN):
            return []
        return [weight for name in WAY_IN if (weight := table[name]) is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> "Experts":
        """Of `to` and the like: only the CPU's kernels take packed weights."""
        super()._apply(fn, recurse)
        if not held(self, "w_up").is_cpu:
            self.unpack_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:
            return
        for name in WAY_IN:  # as they are, but for packed ones
            if (weight := destination.get(prefix + name)) is not None:
                destination[prefix + name] = weight.contiguous()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """torch copies between int8 and floats without a word, which makes nonsense of either."""
        for name in SCALES:
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and (given.dtype == torch.int8) != self.is_int8:
                step = "dequantize_experts_" if self.is_int8 else "quantize_experts_"
                kinds = ("floats", "int8") if self.is_int8 else ("int8", "floats")
                errors.append(
                    f"{prefix}{name} is of {kinds[0]}, the model's experts are {kinds[1]}: {step}(model) first"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def dense(self, x: Tensor) -> Tensor:
        """The dense FFN by torch's own products: x [T, d] -> [T, d_out]."""
        return self._down(self._hidden(x))

    def op_on_all(self, x: Tensor) -> Tensor:
        """The same by the op that runs sparsely, every expert for every token: as fewer, larger ones, which is faster.

        Not so on CUDA, where it was not measured, nor packed, nor in int8, where the activations of an expert are
        rounded together.
        """
        experts = self.experts, self.expert_size
        if self.is_int8 or self.is_packed or not x.is_cpu:
            return self._sparse(x, x.new_ones(x.shape[0], experts[0], dtype=torch.bool))
        larger = _joined(*experts)

        def joined(weight: Any) -> Any:
            return None if weight is None else weight.reshape(*larger, *weight.shape[2:])

        *of_neurons, b_out = self.expert_weights()
        w_up, w_down, b_up, w_gate, b_gate = map(joined, of_neurons)
        mask = x.new_ones(x.shape[0], larger[0], dtype=torch.bool)
        return ops.sparse_experts(x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, act=self.act)

    def masked_dense(self, x: Tensor, mask: Tensor) -> Tensor:
        """`ops.sparse_experts` by torch's own products, every expert computed: x [T, d], mask [T, E] -> [T, d_out]."""
        check_mask(mask, x.shape[0], self.experts)
        return self._down(self._hidden(x, mask))

    @torch.no_grad()
    def expert_norms(self, x: Tensor) -> Tensor:
        """L2 norm of every expert's output, without b_out: x [T, d] -> [T, E], float32 (the router's target)."""
        return self._norms(self._hidden(x))

    def _sparse(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.is_int8:
            return ops.sparse_experts_int8(x, mask, *self.int8_weights(), act=self.act)
        return ops.sparse_experts(x, mask, *self.expert_weights(), act=self.act)

    def _norms(self, hidden: Tensor) -> Tensor:
        """Through the Gram matrices G_e = W_down,e W_down,eᵀ: the norm squared is aᵀ G_e a, so no [T, E, d] is made.

        hidden [T, E * s] -> [T, E], float32, differentiable: the floor keeps the root's slope finite at silent experts.
        """
        by_expert = hidden.float().unflatten(-1, (self.experts, self.expert_size)).transpose(0, 1)
        w_down = self.float_weights("w_down").float()
        with without_autocast(hidden.device):
            squared = (by_expert @ (w_down @ w_down.transpose(1, 2)) * by_expert).sum(-1)
        return squared.clamp(min=NORM_FLOOR**2).sqrt().masked_fill(squared <= NORM_FLOOR**2, 0).t()

    def _hidden(self, x: Tensor, choice: Tensor | None = None, tau: float = 0.0) -> Tensor:
        """Activations in slot order, [T, d] -> [T, E * s]; 0 of the experts that the choice, if given, leaves out.

        choice [T, E]: a mask, or scores of which those run that reach tau.
        """
        up, gate = self._products(x, "w_up", "b_up"), None
        if held(self, "w_gate") is not None:
            gate = self._products(x, "w_gate", "b_gate")
        if choice is not None and runs_plainly(x) and up.dtype in ops.DTYPES:
            ops.masked_activation_(up, gate, choice, tau, self.act)
            return up
        if choice is None:
            act = reference.ACTIVATIONS[self.act]
            return act(up) if gate is None else act(gate) * up
        mask = choice if choice.dtype == torch.bool else ops.dynamic_k_select(choice, tau)
        return reference.masked_activation(up, gate, mask, self.act, self.experts)

    def _products(self, x: Tensor, name: str, bias_name: str) -> Tensor:
        """x [T, d] by all neurons of w_up or w_gate, with the bias: [T, E * s]."""
        return reference.linear_of_experts(x, self.float_weights(name), held(self, bias_name))

    def _down(self, hidden: Tensor) -> Tensor:
        w_down, b_out = self.float_weights("w_down").flatten(0, 1), held(self, "b_out")
        return hidden @ w_down if b_out is None else torch.addmm(b_out, hidden, w_down)


def check_mask(mask: Tensor, tokens: int, experts: int) -> None:
    """Raises TypeError or ValueError unless it is bool [tokens, experts]: a gate of the user's may make another."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}: let the gate return scores > threshold")
    if mask.shape != (tokens, experts):
        raise ValueError(f"mask must be [{tokens}, {experts}], got {list(mask.shape)}")


def _joined(experts: int, expert_size: int) -> tuple[int, int]:
    """Number and size of experts, neighbours joined into one of up to LARGE neurons."""
    together = next(n for n in range(max(LARGE // expert_size, 1), 0, -1) if experts % n == 0)
    return experts // together, together * expert_size


def runs_plainly(x: Tensor) -> bool:
    """Whether x [T, d] is tokens to count on a known device, and nothing records, traces or transforms the call.

    So what is computed of it may be looked at and overwritten. No gradients of either kind, no graph, no vmap.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return type(x) is Tensor and (x.is_cpu or x.is_cuda) and x.shape[0] > 0  # by len(x) it takes 3 µs more
