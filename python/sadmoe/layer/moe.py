"""The module that replaces an FFN: a router and a gate, which choose experts for each token, and the way these run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe import ops, paths, reference
from sadmoe.crossover import LayerShape
from sadmoe.forward import is_recomputed
from sadmoe.gates import DynamicK, Gate
from sadmoe.layer.experts import Experts, check_mask, runs_plainly
from sadmoe.layer.held import held
from sadmoe.layer.router import Router
from sadmoe.layer.shared import SharedExpert


class DynamicKMoE(Experts):
    """A dense FFN cut into E experts of s neurons, of which each token runs those its router picks.

    Equivalent in torch: `reference.sparse_experts(x, gate.mask(router(x)), ...)`. With `gate = DynamicK(0.0)` it is
    the dense FFN: every expert runs, and the router is not asked.

    Weights: see `Experts`. `shared`, a SharedExpert or None, adds its output wherever tau > 0 (see `compensate_`);
    `dropout`, an nn.Dropout or None, acts on the output.

    batch_invariant: must a token's bits depend on nothing but the token? Where many experts run, computing all of them
    by torch's products and masking their neurons can be faster than the sparse op, and `paths` says where; but how
    torch's products round differs with the number of tokens.
      True   yes: always the op, also at tau = 0.
      None   the default: yes in float32 at tau > 0. In 16 bits dense runs where it is over 10 % faster (CUDA: 5 %).
             What decides is the same from run to run: on the CPU the mask of the call, on CUDA `expected_share`, for
             the share of this call would have to be waited for. Without it dense runs there only where it wins at any
             share, as with few tokens in small layers.
      False  no: dense wherever it is faster. On CUDA by the share of earlier calls, from whenever it has arrived.
    At tau = 0 it runs torch's products, or the op where that was measured to be faster, as it mostly is on the CPU;
    with True, int8 or packed always the op. With gradients, and in graphs of torch.compile and torch.export, it is
    always the op at tau > 0 (but for `keeps_hidden`), and torch at tau = 0 (but for True, int8 and packed). Gates on
    true norms compute all experts. `expected_share`: the executed share in [0, 1] that decides on CUDA instead of that
    of earlier calls, so also under graph capture. Neither is saved with the model.

    keeps_hidden: True while `finetune_` trains it under the model's own gates. Every expert is computed, as the
    backward pass has to, and what it computed is kept until then; the op's backward pass computes it again.

    After `to_int8_` the op of int8 runs at every tau, whatever batch_invariant says, and a router in float32 has become
    bfloat16. After `pack_` the op runs at every tau, too.
    """

    shared: SharedExpert | None
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
        bias: Collection[str] = (),
        dropout: float = 0.0,
        gate: Gate | None = None,
        batch_invariant: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """bias: which of "b_up", "b_gate", "b_out" exist. Weights start uninitialised: they are copied or loaded."""
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(d, experts, expert_size, act, d_out=d_out, gated=gated, bias=bias, **kw)
        self._before_int8: tuple[torch.dtype, torch.dtype] | None = None  # dtypes of router and experts
        self.router = Router(d, experts, router_width, **kw)
        self.register_module("shared", None)
        # A module, for whoever looks for such: to switch them off, or to leave them on in evaluation.
        self.register_module("dropout", nn.Dropout(dropout) if dropout else None)
        self.gate: Gate = DynamicK(0.0) if gate is None else gate
        self.batch_invariant = batch_invariant
        self.expected_share: float | None = None
        self._share_hint = paths.ShareHint()
        self._shapes: dict[torch.dtype, LayerShape] = {}
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
        if name == "gate":
            self._modules.pop("gate", None)  # one that is a module could not be followed by one that is none
        super().__setattr__(name, value)

    @property
    def shape(self) -> LayerShape:
        """Its sizes, as the costs of paths are looked up by."""
        (E, s, d), bytes_each = self.w_up.shape, self.w_up.dtype.itemsize
        gated, r = self.w_gate is not None, self.router.v1.shape[0]
        return LayerShape(d, self.w_down.shape[2], E, s, r, gated, bytes_each)

    @property
    def runs_all_experts(self) -> bool:
        """Whether it is the dense FFN: every expert runs for every token, and no router is asked."""
        return type(self.gate) is DynamicK and self.gate.tau == 0.0

    @torch.no_grad()
    def to_int8_(self, *, rounded_router: bool = True) -> None:
        """Rounds the experts' weights to int8, in place: see `Experts.to_int8_`.

        rounded_router: a router in float32, up to half of the bytes that a token then needs, becomes bfloat16; scores
        are float32 all the same.
        """
        super().to_int8_()
        assert self.scale_up is not None
        self._before_int8 = self.router.v1.dtype, self.scale_up.dtype
        if rounded_router and self.router.v1.dtype == torch.float32:
            self.router.cast_(torch.bfloat16)

    @torch.no_grad()
    def to_float_(self) -> None:
        """Undoes `to_int8_`, in place, but for its rounding. Raises ValueError where the experts are not int8.

        The router gets the dtype that it had, or where it was loaded so, that of the experts.
        """
        super().to_float_()
        of_router, of_experts = self._before_int8 or (None, None)
        cast_since = of_experts != self.w_up.dtype
        self.router.cast_(self.w_up.dtype if cast_since or of_router is None else of_router)
        self._before_int8 = None

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """x [..., d] -> [..., d_out]; x by whatever name the FFN was called with."""
        if x is None or named:
            x = only_input(() if x is None else (x,), named)
        flat = x.dim() == 2
        rows = x if flat else x.reshape(-1, x.shape[-1])
        gate = self.gate
        if self.check_nan:
            self._refuse_nan(rows)
        if gate.true_norms:
            y = self._by_true_norms(rows, x.shape[:-1])
        elif self.runs_all_experts:
            y = self.op_on_all(rows) if self._op_runs_all(rows) else self.dense(rows)
        else:
            y = self._selected(rows)
        shared: Any = self._modules["shared"]
        if shared is not None and (scale := shared.scale(gate, self.router.target_power)):
            y = torch.add(y, shared(rows), alpha=scale)
        if (dropout := self._modules["dropout"]) is not None:
            y = dropout(y)
        return y if flat else y.reshape(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def _refuse_nan(self, x: Tensor) -> None:
        """Raises ValueError where NaN of x [T, d], or of what says which experts run, leaves a token without some."""
        if x.isnan().any():
            raise ValueError(
                "DynamicKMoE: x has NaN, for which no expert can be chosen; an earlier layer made it"
            )
        if (
            not self.runs_all_experts
            and (self.expert_norms if self.gate.true_norms else self.router)(x).isnan().any()
        ):
            raise ValueError(
                "DynamicKMoE: its experts' scores have NaN, by which none is chosen; look for inf in x, and NaN or inf "
                f"in the weights of its {'experts' if self.gate.true_norms else 'router'}"
            )

    def mask(self, x: Tensor) -> Tensor:
        """The experts that `forward` runs: x [..., d] -> bool [..., E]."""
        rows = x.reshape(-1, x.shape[-1])
        mask = self.gate.mask(self.expert_norms(rows) if self.gate.true_norms else self.router(rows))
        check_mask(mask, rows.shape[0], self.experts)
        return mask.reshape(*x.shape[:-1], self.experts)

    def takes_dense_path(self, x: Tensor) -> bool:
        """Whether `forward` would compute every expert of x [..., d] by torch's products, instead of the sparse op."""
        rows = x.reshape(-1, x.shape[-1])
        if self.gate.true_norms or (self.keeps_hidden and not self.runs_all_experts):
            return True
        return not self._op_runs_all(rows) if self.runs_all_experts else self._choose(rows)[0]

    def _selected(self, x: Tensor) -> Tensor:
        """The experts that the gate picks, by the path that `_choose` says."""
        if self.keeps_hidden:
            return self.masked_dense(x, self.mask(x))
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
        # A forward of the user's, and hooks, such as accelerate's and pruning's, run only where the router is called.
        plain = type(router).forward is Router.forward and (
            "forward" not in own
            or own["forward"] == MethodType(Router.forward, router)  # as accelerate leaves it
        )
        if not plain or "_hf_hook" in own or own["_forward_pre_hooks"] or own["_forward_hooks"]:
            return self._sparse(x, self.mask(x))
        v1, v2 = router.weights()
        if self.is_int8:
            return ops.dynamic_k_moe_int8(x, v1, v2, *self.int8_weights(), tau=tau, act=self.act)
        return ops.dynamic_k_moe(x, v1, v2, *self.expert_weights(), tau=tau, act=self.act)

    def _op_runs_all(self, x: Tensor) -> bool:
        """Whether x [T, d] goes through every expert by the op, instead of torch's products."""
        if self.keeps_hidden:
            return False
        if self.batch_invariant or self.is_int8 or self.is_packed:
            return True
        if not runs_plainly(x) or (dtype := self._dtype_of_products(x)) is None:
            return False
        return paths.op_runs_all(self._shape_in(dtype), x.shape[0], x.device, dtype)

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

    def _sparse_until(self, x: Tensor) -> float:
        """The executed share up to which the op runs for so many tokens of that device and dtype; 1: always."""
        if self.batch_invariant or self.is_int8 or torch.compiler.is_compiling():
            return 1.0
        unasked = self.batch_invariant is None
        if unasked and x.dtype.itemsize > 2 and not torch._C._is_any_autocast_enabled():
            return 1.0  # at once: the checks below take time and would not change the answer
        if self.is_packed or not runs_plainly(x) or (dtype := self._dtype_of_products(x)) is None:
            return 1.0
        if unasked and dtype.itemsize > 2:
            return 1.0
        slack = paths.WORTH[x.device.type] if unasked else 1.0
        until = paths.sparse_until(self._shape_in(dtype), x.shape[0], x.device, dtype, slack)
        if unasked and x.device.type == "cuda" and self.expected_share is None:
            any_share = until * self.experts < 1  # all that is known of it: a token runs one expert at least
            return 0.0 if any_share else 1.0
        return until

    def _dtype_of_products(self, x: Tensor) -> torch.dtype | None:
        """What torch multiplies x in; None where it refuses, as x is not of the weights' dtype."""
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.dtype == held(self, "w_up").dtype else None

    def _shape_in(self, dtype: torch.dtype) -> LayerShape:
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
                hook(norms.reshape(*tokens, self.experts))
        mask = self.gate.mask(norms.detach())
        return self._down(reference.of_chosen(hidden, mask, self.experts))

    def extra_repr(self) -> str:
        d_out = self.w_down.shape[2]
        return (
            f"d={self.w_up.shape[2]}, experts={self.experts}, expert_size={self.expert_size}, act={self.act}"
            + (", gated" if self.w_gate is not None else "")
            + (", int8" if self.is_int8 else "")
            + (", packed" if self.is_packed else "")
            + (f", d_out={d_out}" if d_out != self.w_up.shape[2] else "")
            + f", gate={self.gate}"
        )


def only_input(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What a converted layer is called with, by place or by any name: for hooks."""
    given = (*args, *named.values())
    if len(given) != 1:
        raise TypeError(
            f"a converted FFN takes one tensor [..., d], and was called with {len(given)} arguments"
        )
    return given[0]
