"""The modules that replace an FFN: a router, and the experts with a gate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sadmoe import ops, paths, reference
from sadmoe.crossover import Layer
from sadmoe.gates import DynamicK, Gate
from sadmoe.gradients import is_recomputed, without_autocast
from sadmoe.rounding import column_scales as scales_of_columns
from sadmoe.rounding import to_int8

SCALES = {"w_up": "scale_up", "w_gate": "scale_gate", "w_down": "scale_down"}  # of weights in int8
ALL_SCALES = (*SCALES.values(), "scale_out")
Maybe = Tensor | None
Int8Weights = tuple[Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]
LARGE = 128  # neurons from which an expert costs the op no less per neuron: `op_on_all` joins smaller ones up to it
NORM_FLOOR = 1e-12  # norms below it are 0: what rounding leaves of a silent expert


class Router(nn.Module):
    """Two layers without biases that predict the output norm of every expert: |relu(x v1ᵀ) v2ᵀ|.

    v1 [r, d], v2 [E, r], which ask for no gradient: `fit_routers_` trains them, a model's own loss never does.
    Source: arXiv 2310.04361, section 3.
    """

    def __init__(
        self,
        d: int,
        experts: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        v1, v2 = (torch.empty(n, m, device=device, dtype=dtype) for n, m in ((width, d), (experts, width)))
        self.v1, self.v2 = nn.Parameter(v1, requires_grad=False), nn.Parameter(v2, requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's initialisation of a linear layer, for both."""
        for v in (self.v1, self.v2):
            nn.init.kaiming_uniform_(v, a=5**0.5)

    def cast_(self, dtype: torch.dtype) -> None:
        """As `to(dtype)`, but in parameters of its own: the former ones stay what they were."""
        self.v1, self.v2 = (nn.Parameter(v.to(dtype), v.requires_grad) for v in self.weights())

    def weights(self) -> tuple[Tensor, Tensor]:
        """v1, v2: the order of the ops."""
        return _held(self, "v1"), _held(self, "v2")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> scores [..., E], float32, >= 0."""
        scores = ops.router_scores(x.reshape(-1, x.shape[-1]), *self.weights())
        return scores.reshape(*x.shape[:-1], scores.shape[-1])

    def extra_repr(self) -> str:
        return f"d={self.v1.shape[1]}, width={self.v1.shape[0]}, experts={self.v2.shape[0]}"


class DynamicKMoE(nn.Module):
    """A dense FFN cut into E experts of s neurons, of which each token runs those its router picks.

    Equivalent in torch: `reference.sparse_experts(x, gate.mask(router(x)), ...)`. With `gate = DynamicK(0.0)` it is
    the dense FFN: every expert runs, and the router is not asked.

    w_up, w_gate [E, s, d]; w_down [E, s, d_out]; b_up, b_gate [E, s]; b_out [d_out]; permutation [E * s]: the neuron
    of the dense FFN that each slot holds. `dropout`, an nn.Dropout or None, acts on the output.

    batch_invariant: must a token's bits depend on nothing but the token? Where many experts run, computing all of them
    by torch's products and masking their neurons can be faster than the sparse op, and `paths` says where; but how
    torch's products round differs with the number of tokens.
      True   yes: always the op, also at tau = 0.
      None   the default: yes in float32 at tau > 0. In 16 bits dense runs where it is over 10 % faster (CUDA: 5 %).
             What decides is the same from run to run: on the CPU the mask of the call, on CUDA `expected_share`, for
             the share of this call would have to be waited for. Without it dense runs there only where it wins at any
             share, as with few tokens in small layers.
      False  no: dense wherever it is faster. On CUDA by the share of earlier calls, from whenever it has arrived.
    At tau = 0, but for True and int8, torch's products, or the op where that was measured to be faster, as it mostly is
    on the CPU. With gradients, and in graphs of torch.compile and torch.export, always the op at tau > 0, but
    for `keeps_hidden`, and always torch at tau = 0, but for True and int8; gates on true norms compute all experts.
    `expected_share`: the executed share in [0, 1] that decides on CUDA instead of that of earlier calls, so also under
    graph capture. Neither is saved with the model.

    keeps_hidden: True while it is trained by `finetune_`. Every expert is computed, as the backward pass has to, and
    what it computed is kept until then; the op's backward pass computes it again.

    After `to_int8_`, w_up, w_gate and w_down are int8 and stand for themselves times scale_up, scale_gate and
    scale_down [E, s], and w_down's columns times scale_out [d_out]; else those are None. A router in float32 has become
    bfloat16. The op of int8 then runs at every tau, whatever batch_invariant says.
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
    dropout: nn.Dropout | None

    def __init__(
        self,
        d: int,
        experts: int,
        expert_size: int,
        act: str,
        *,
        router_width: int = 128,
        d_out: int | None = None,
        gated: bool = False,
        bias: tuple[str, ...] = (),
        dropout: float = 0.0,
        gate: Gate | None = None,
        batch_invariant: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """bias: which of "b_up", "b_gate", "b_out" exist. Weights start uninitialised: they are copied or loaded."""
        super().__init__()
        if act not in reference.ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(reference.ACTIVATIONS)}, got {act!r}")
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
        self._before_int8: tuple[torch.dtype, torch.dtype] | None = None  # dtypes of router and experts
        self.router = Router(d, experts, router_width, **kw)
        self.act = act
        # A module, for whoever looks for such: to switch them off, or to leave them on in evaluation.
        self.register_module("dropout", nn.Dropout(dropout) if dropout else None)
        self.gate: Gate = DynamicK(0.0) if gate is None else gate
        self.batch_invariant = batch_invariant
        self.expected_share: float | None = None
        self._share_hint = paths.ShareHint()
        self._shapes: dict[torch.dtype, Layer] = {}
        self.keeps_hidden = False
        self.check_nan = False
        # They see the norms [..., E] of a gate on true norms.
        self.norms_hooks: list[Callable[[Tensor], None]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gate" and not (callable(getattr(value, "mask", None)) and hasattr(value, "true_norms")):
            raise TypeError(
                f"gate must be a DynamicK, a TopK or another Gate, got {value!r}: DynamicK(tau), or set_tau(model, tau)"
                "; one of your own needs mask(scores) and true_norms"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle; the first ones held dropout as a number."""
        super().__setstate__(state)
        if "dropout" in self.__dict__:
            p = self.__dict__.pop("dropout")
            self.register_module("dropout", nn.Dropout(p).train(self.training) if p else None)

    @property
    def experts(self) -> int:
        return _held(self, "w_up").shape[0]

    @property
    def expert_size(self) -> int:
        return _held(self, "w_up").shape[1]

    @property
    def shape(self) -> Layer:
        """Its sizes, as the costs of paths are looked up by."""
        (E, s, d), bytes_each = self.w_up.shape, self.w_up.dtype.itemsize
        gated, r = self.w_gate is not None, self.router.v1.shape[0]
        return Layer(d, self.w_down.shape[2], E, s, r, gated, bytes_each)

    @property
    def runs_all_experts(self) -> bool:
        """Whether it is the dense FFN: every expert runs for every token, and no router is asked."""
        return type(self.gate) is DynamicK and self.gate.tau == 0.0

    @property
    def is_int8(self) -> bool:
        """Whether the experts' weights are int8, with scales."""
        return self._buffers["scale_up"] is not None  # every call asks: as an attribute it would take 1 µs

    def expert_weights(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """w_up, w_down, b_up, w_gate, b_gate, b_out: the order of the ops."""
        w_up, w_down, b_up = _held(self, "w_up"), _held(self, "w_down"), _held(self, "b_up")
        return w_up, w_down, b_up, _held(self, "w_gate"), _held(self, "b_gate"), _held(self, "b_out")

    def int8_weights(self) -> Int8Weights:
        """The same with scales, in the order of the ops of int8; only where they are int8."""
        assert self.scale_up is not None
        assert self.scale_down is not None
        scales, gate = (self.scale_up, self.scale_down), (self.w_gate, self.scale_gate)
        return self.w_up, self.w_down, *scales, self.b_up, *gate, self.b_gate, self.b_out, self.scale_out

    def float_weights(self, name: str) -> Tensor:
        """w_up, w_down or, of a GLU, w_gate as floats, by name: the parameter itself, or what int8 stands for."""
        weight, scale = _held(self, name), self._buffers[SCALES[name]]
        columns = self._buffers["scale_out"] if name == "w_down" else None
        return weight if scale is None else reference.dequantized(weight, scale, scale.dtype, columns)

    def trains(self, name: str) -> bool:
        """Whether a parameter, by name, requires a gradient; of weights in int8, whether they would as floats."""
        if self.is_int8 and name in SCALES:
            return getattr(self, name) is not None and name not in self._frozen
        parameter = getattr(self, name)
        return parameter is not None and parameter.requires_grad

    @torch.no_grad()
    def to_int8_(self, *, column_scales: bool = True, rounded_router: bool = True) -> None:
        """Rounds the experts' weights to int8, in place: 127 steps to each side of 0 up to a neuron's largest weight.

        column_scales: w_down is first divided by a scale for each column, a power of two, as some features of a
        transformer are many times larger than the others, of which steps as large would leave little.
        rounded_router: a router in float32, up to half of the bytes that a token then needs, becomes bfloat16; scores
        are float32 all the same.

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
            if name == "w_down" and column_scales:
                made["scale_out"] = scales_of_columns(rows).to(weight.dtype)
                rows = rows / made["scale_out"].float()
            steps, made[scale_name] = to_int8(rows, weight.dtype)
            made[name] = nn.Parameter(steps, requires_grad=False)
        self._frozen = frozenset(name for name in SCALES if not self.trains(name))
        for name, value in made.items():
            setattr(self, name, value)
        assert self.scale_up is not None
        self._before_int8 = self.router.v1.dtype, self.scale_up.dtype
        if rounded_router and self.router.v1.dtype == torch.float32:
            self.router.cast_(torch.bfloat16)

    @torch.no_grad()
    def to_float_(self) -> None:
        """Undoes `to_int8_`, in place, but for its rounding. Raises ValueError where the experts are not int8.

        The router gets the dtype that it had, or where it was loaded so, that of the experts.
        """
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
        of_router, of_experts = self._before_int8 or (None, None)
        cast_since = of_experts != self.w_up.dtype
        self.router.cast_(self.w_up.dtype if cast_since or of_router is None else of_router)
        self._before_int8 = None

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
        given = state_dict.get(f"{prefix}w_up")
        if isinstance(given, Tensor) and (given.dtype == torch.int8) != self.is_int8:
            step = "dequantize_experts_" if self.is_int8 else "quantize_experts_"
            kinds = ("floats", "int8") if self.is_int8 else ("int8", "floats")
            errors.append(
                f"{prefix}w_up is of {kinds[0]}, the model's experts are {kinds[1]}: {step}(model) first"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """x [..., d] -> [..., d_out]; x by whatever name the FFN was called with."""
        if x is None or named:
            x = only_input(() if x is None else (x,), named)
        flat = x.dim() == 2
        rows = x if flat else x.reshape(-1, x.shape[-1])
        gate = self.gate
        if self.check_nan and rows.isnan().any():
            raise ValueError(
                "DynamicKMoE: x has NaN, for which no expert can be chosen; an earlier layer made it"
            )
        if gate.true_norms:
            y = self._by_true_norms(rows, x.shape[:-1])
        elif self.runs_all_experts:
            y = self.op_on_all(rows) if self._op_runs_all(rows) else self.dense(rows)
        else:
            y = self._selected(rows)
        if (dropout := self._modules["dropout"]) is not None:
            y = dropout(y)
        return y if flat else y.reshape(*x.shape[:-1], y.shape[-1])

    def mask(self, x: Tensor) -> Tensor:
        """The experts that `forward` runs: x [..., d] -> bool [..., E]."""
        rows = x.reshape(-1, x.shape[-1])
        scores = self.expert_norms(rows) if self.gate.true_norms else self.router(rows)
        return self.gate.mask(scores).reshape(*x.shape[:-1], self.experts)

    def takes_dense_path(self, x: Tensor) -> bool:
        """Whether `forward` would compute every expert of x [..., d] by torch's products, instead of the sparse op."""
        rows = x.reshape(-1, x.shape[-1])
        if self.gate.true_norms or (self.keeps_hidden and not self.runs_all_experts):
            return True
        return not self._op_runs_all(rows) if self.runs_all_experts else self._choose(rows)[0]

    def dense(self, x: Tensor) -> Tensor:
        """The dense FFN by torch's own products: x [T, d] -> [T, d_out]."""
        return self._down(self._hidden(x))

    def op_on_all(self, x: Tensor) -> Tensor:
        """The same by the op that runs sparsely, every expert for every token: as fewer, larger ones, which is faster.

        Not so on CUDA, where it was not measured, nor in int8, where the activations of an expert are rounded together.
        """
        experts = self.experts, self.expert_size
        if self.is_int8 or not x.is_cpu:
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
        return self._down(self._hidden(x, mask))

    @torch.no_grad()
    def expert_norms(self, x: Tensor) -> Tensor:
        """L2 norm of every expert's output, without b_out: x [T, d] -> [T, E], float32 (the router's target)."""
        return self._norms(self._hidden(x))

    def _selected(self, x: Tensor) -> Tensor:
        """The experts that the gate picks, by the path that `_choose` says."""
        if self.keeps_hidden:
            return self._down(self._hidden(x, self.mask(x)))
        gate = self.gate
        dense, mask = self._choose(x)
        if type(gate) is DynamicK and mask is None:  # a gate made of it may have a rule of its own
            if dense:  # without a mask: on CUDA that is a launch less
                return self._down(self._hidden(x, self.router(x), gate.tau))
            return self._dynamic_k(x, gate.tau)
        mask = self.mask(x) if mask is None else mask
        return self.masked_dense(x, mask) if dense else self._sparse(x, mask)

    def _dynamic_k(self, x: Tensor, tau: float) -> Tensor:
        router: Any = self._modules["router"]  # as an attribute it is slow, too
        own = router.__dict__
        if (
            "_hf_hook" in own or own["_forward_pre_hooks"] or own["_forward_hooks"]
        ):  # such as accelerate's and pruning's
            return self._sparse(x, self.mask(x))
        v1, v2 = router.weights()
        if self.is_int8:
            return ops.dynamic_k_moe_int8(x, v1, v2, *self.int8_weights(), tau=tau, act=self.act)
        return ops.dynamic_k_moe(x, v1, v2, *self.expert_weights(), tau=tau, act=self.act)

    def _sparse(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.is_int8:
            return ops.sparse_experts_int8(x, mask, *self.int8_weights(), act=self.act)
        return ops.sparse_experts(x, mask, *self.expert_weights(), act=self.act)

    def _op_runs_all(self, x: Tensor) -> bool:
        """Whether x [T, d] goes through every expert by the op, instead of torch's products."""
        if self.keeps_hidden:
            return False
        if self.batch_invariant or self.is_int8:
            return True
        if not self._runs_plainly(x) or (dtype := self._dtype_of_products(x)) is None:
            return False
        return paths.op_runs_all(self._shape_in(dtype), len(x), x.device, dtype)

    def _choose(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether x [T, d] takes the dense path, and its mask where that had to be known. Waits for no CUDA device."""
        until = self._sparse_until(x)
        if until >= 1.0:
            return False, None
        if x.device.type == "cpu":  # counted before it is run: the choice is a function of this call
            mask = self.mask(x)
            return mask.sum().item() > until * mask.numel(), mask
        if self.expected_share is not None:
            return self.expected_share > until, None
        share, counted = self._share_hint.read(self.gate), None
        if until > 0.0 and self._share_hint.wanted():
            counted = self.mask(x)
            self._share_hint.send(counted)
        return share is None or share > until, counted  # unknown: dense, at worst as slow as dense

    def _runs_plainly(self, x: Tensor) -> bool:
        """Whether x [T, d] is tokens to count on a known device, and nothing records, traces or transforms the call.

        So what is computed of it may be looked at and overwritten. No gradients of either kind, no graph, no vmap.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return False
        return type(x) is Tensor and (x.is_cpu or x.is_cuda) and len(x) > 0

    def _sparse_until(self, x: Tensor) -> float:
        """The executed share up to which the op runs for so many tokens of that device and dtype; 1: always."""
        if self.batch_invariant or self.is_int8 or torch.compiler.is_compiling():
            return 1.0
        unasked = self.batch_invariant is None
        if unasked and x.dtype.itemsize > 2 and not torch._C._is_any_autocast_enabled():
            return 1.0  # at once: the checks below take time and would not change the answer
        if not self._runs_plainly(x) or (dtype := self._dtype_of_products(x)) is None:
            return 1.0
        if unasked and dtype.itemsize > 2:
            return 1.0
        slack = paths.WORTH[x.device.type] if unasked else 1.0
        until = paths.sparse_until(self._shape_in(dtype), len(x), x.device, dtype, slack)
        if unasked and x.device.type == "cuda" and self.expected_share is None:
            any_share = until * self.experts < 1  # all that is known of it: a token runs one expert at least
            return 0.0 if any_share else 1.0
        return until

    def _dtype_of_products(self, x: Tensor) -> torch.dtype | None:
        """What torch multiplies x in; None where it refuses, as x is not of the weights' dtype."""
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.dtype == _held(self, "w_up").dtype else None

    def _shape_in(self, dtype: torch.dtype) -> Layer:
        if dtype not in self._shapes:  # every call asks: it takes 7 µs
            self._shapes[dtype] = replace(self.shape, bytes_each=dtype.itemsize)
        return self._shapes[dtype]

    def _by_true_norms(self, x: Tensor, tokens: torch.Size) -> Tensor:
        """Every expert is computed to know its norm, so this path is plain torch; gradients hold the mask constant.

        x [T, d] -> [T, d_out]. tokens: their shape in what entered, which the hooks are shown.
        """
        hidden = self._hidden(x)
        norms = self._norms(hidden)
        if self.norms_hooks and not is_recomputed():
            for hook in self.norms_hooks:
                hook(norms.reshape(*tokens, -1))
        return self._down(self._kept(hidden, self.gate.mask(norms.detach())))

    def _kept(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [T, E * s] with the neurons of experts outside the mask [T, E] zero, also where they were NaN."""
        return hidden.unflatten(-1, (self.experts, self.expert_size)).where(mask.unsqueeze(-1), 0).flatten(-2)

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
        if _held(self, "w_gate") is not None:
            gate = self._products(x, "w_gate", "b_gate")
        if choice is not None and self._runs_plainly(x) and up.dtype in ops.DTYPES:
            ops.masked_activation_(up, gate, choice, tau, self.act)
            return up
        act = reference.ACTIVATIONS[self.act]
        hidden = act(up) if gate is None else act(gate) * up
        if choice is None:
            return hidden
        return self._kept(hidden, choice if choice.dtype == torch.bool else ops.dynamic_k_select(choice, tau))

    def _products(self, x: Tensor, name: str, bias_name: str) -> Tensor:
        """x [T, d] by all neurons of w_up or w_gate, with the bias: [T, E * s]."""
        bias = _held(self, bias_name)
        return F.linear(x, self.float_weights(name).flatten(0, 1), None if bias is None else bias.flatten())

    def _down(self, hidden: Tensor) -> Tensor:
        w_down, b_out = self.float_weights("w_down").flatten(0, 1), _held(self, "b_out")
        return hidden @ w_down if b_out is None else torch.addmm(b_out, hidden, w_down)

    def extra_repr(self) -> str:
        d_out = self.w_down.shape[2]
        return (
            f"d={self.w_up.shape[2]}, experts={self.experts}, expert_size={self.expert_size}, act={self.act}"
            + (", gated" if self.w_gate is not None else "")
            + (", int8" if self.is_int8 else "")
            + (f", d_out={d_out}" if d_out != self.w_up.shape[2] else "")
            + f", gate={self.gate}"
        )


def _held(module: nn.Module, name: str) -> Any:
    """A parameter, in a tenth of the time that it takes as an attribute: every call asks for all of them."""
    held = module._parameters
    if name in held:
        return held[name]
    return getattr(module, name)  # torch's parametrize and prune make it of others


def _joined(experts: int, expert_size: int) -> tuple[int, int]:
    """Number and size of experts, neighbours joined into one of up to LARGE neurons."""
    together = next(n for n in range(max(LARGE // expert_size, 1), 0, -1) if experts % n == 0)
    return experts // together, together * expert_size


def only_input(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What a converted layer is called with, by place or by any name: for hooks."""
    given = (*args, *named.values())
    if len(given) != 1:
        raise TypeError(
            f"a converted FFN takes one tensor [..., d], and was called with {len(given)} arguments"
        )
    return given[0]
