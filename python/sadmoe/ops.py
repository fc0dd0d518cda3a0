"""The ops of `torch.ops.sadmoe`: loads the compiled library, and says everything about an op that is not its kernel.

Every op runs in C++ on the CPU and in CUDA, traces on meta and fake tensors, has gradients and a FLOP formula,
and answers through `sadmoe.reference` on devices without a kernel, with one warning; but for `masked_activation_`, with
which a layer's dense path works in place where nothing of that is asked for.
"""

import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from sadmoe import gradients, reference

_LIBRARY = Path(__file__).with_name("_ops.so")


def _load() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"sadmoe's compiled ops are missing ({_LIBRARY}). Build them with `pip install .` in the source tree, and "
            "import sadmoe from outside it; or `pip install -e .` to work inside it."
        )
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        raise ImportError(
            f"sadmoe needs torch >= 2.10, found {torch.__version__}: pip install --upgrade torch"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"sadmoe's compiled ops do not load beside torch {torch.__version__}: {error}. Reinstall sadmoe in this "
            "environment with `pip install --force-reinstall --no-deps .`"
        ) from error


_load()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take

_ROUTER_SCORES = torch.ops.sadmoe.router_scores.default
_DYNAMIC_K_SELECT = torch.ops.sadmoe.dynamic_k_select.default
_SPARSE_EXPERTS = torch.ops.sadmoe.sparse_experts.default
_DYNAMIC_K_MOE = torch.ops.sadmoe.dynamic_k_moe.default
_SPARSE_EXPERTS_INT8 = torch.ops.sadmoe.sparse_experts_int8.default
_DYNAMIC_K_MOE_INT8 = torch.ops.sadmoe.dynamic_k_moe_int8.default
_MASKED_ACTIVATION_ = torch.ops.sadmoe._masked_activation_.default


def _run(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """The op; without gradients, past its rule for them.

    The rule is Python: with cold caches, calling it only to learn that no gradient is wanted takes longer than a kernel
    with one token. Inside the transforms of torch.func and forward-mode gradients, but for graphs of torch.compile, it
    is plain torch, every expert computed.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return _in_plain_torch(op, args)
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def router_scores(x: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    """Predicted output norm of every expert, `relu(x @ v1.T) @ v2.T` without its sign, in float32.

    x [T, d], v1 [r, d], v2 [E, r], each float32, bfloat16 or float16 -> float32 [T, E], >= 0.
    Raises RuntimeError that names the argument whose shape or dtype does not fit. Source: arXiv 2310.04361, section 3.
    """
    return _run(_ROUTER_SCORES, x, v1, v2)


def dynamic_k_select(scores: Tensor, tau: float) -> Tensor:
    """Dynamic-k rule, `scores >= tau * scores.amax(-1, keepdim=True)`.

    scores float32 [T, E], 0 <= tau <= 1 (0: every expert, 1: the top one and its ties) -> bool [T, E].
    An all-zero row selects every expert; a negative score counts as 0; NaN is never selected.
    Source: arXiv 2310.04361, section 3 (its code calls this dynk_max and uses 1 - tau).
    """
    return _run(_DYNAMIC_K_SELECT, scores, tau)


def sparse_experts(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """Sum of the experts that the mask picks, unweighted, plus b_out once: `reference.sparse_experts`.

    x [T, d], mask bool [T, E], w_up, w_gate [E, s, d], w_down [E, s, d_out], b_up, b_gate [E, s], b_out [d_out];
    act a key of `reference.ACTIVATIONS` -> [T, d_out] of x's dtype. Sums in float32, experts in ascending order,
    on the CPU in float32 every 16 by themselves first: a token's result does not depend on its neighbours, the
    number of threads or the run, bit for bit.
    """
    return _run(_SPARSE_EXPERTS, x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, act)


def dynamic_k_moe(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    tau: float = 0.0,
    act: str = "relu",
) -> Tensor:
    """`sparse_experts(x, dynamic_k_select(router_scores(x, v1, v2), tau), ...)` in one pass over the tokens.

    Gradients reach x and the experts with the mask held constant; v1 and v2 get none (train them on `router_scores`).
    """
    return _run(_DYNAMIC_K_MOE, x, v1, v2, w_up, w_down, b_up, w_gate, b_gate, b_out, tau, act)


def sparse_experts_int8(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    scale_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """`sparse_experts` of weights in int8: a neuron's are its row of integers times its scale.

    w_up, w_gate, w_down int8, shapes as there; scale_up, scale_gate, scale_down floating [E, s]; scale_out floating
    [d_out], if given, multiplies the columns of w_down as well; x, biases and the result as there. A token's row of x,
    and its activations in each expert, are rounded to at most 65535 steps over twice the largest of them; products with
    the weights and their sums within an expert are then exact. Only the CPU has kernels for it; on other devices
    `sparse_experts` runs on weights that are widened at every call, without that rounding and with one warning.
    Gradients reach x and biases.
    """
    experts = w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    return _run(_SPARSE_EXPERTS_INT8, x, mask, *experts, act)


def dynamic_k_moe_int8(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    scale_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    tau: float = 0.0,
    act: str = "relu",
) -> Tensor:
    """`dynamic_k_moe` of weights in int8, as `sparse_experts_int8` takes them."""
    experts = w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    return _run(_DYNAMIC_K_MOE_INT8, x, v1, v2, *experts, tau, act)


def masked_activation_(up: Tensor, gate: Tensor | None, choice: Tensor, tau: float, act: str) -> None:
    """Hidden activations of dense products in one pass, in place; for no gradients and no graphs.

    up, gate [T, E * s]; choice [T, E], a bool mask, or float32 scores, of which `dynamic_k_select` takes those that
    reach tau: up becomes act(up), or of a GLU act(gate) * up, and 0 of experts not chosen, also where it was NaN.
    up is contiguous, gate of its dtype; computed in float32, rounded once.
    """
    with torch._C._AutoDispatchBelowAutograd():
        _MASKED_ACTIVATION_(up, gate, choice, tau, act)


# --- Shapes, for meta tensors, torch.compile and torch.export.


@torch.library.register_fake("sadmoe::router_scores")
def _router_scores_shape(x: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], v2.shape[0]), dtype=torch.float32)


@torch.library.register_fake("sadmoe::dynamic_k_select")
def _dynamic_k_select_shape(scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


@torch.library.register_fake("sadmoe::sparse_experts")
@torch.library.register_fake("sadmoe::sparse_experts_int8")
def _sparse_experts_shape(x: Tensor, mask: Tensor, w_up: Tensor, w_down: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], w_down.shape[2]))


@torch.library.register_fake("sadmoe::dynamic_k_moe")
@torch.library.register_fake("sadmoe::dynamic_k_moe_int8")
def _dynamic_k_moe_shape(
    x: Tensor, v1: Tensor, v2: Tensor, w_up: Tensor, w_down: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty((x.shape[0], w_down.shape[2]))


# --- Gradients, with the mask held constant: see `gradients`.

Gradient = Callable[..., tuple[Tensor | None, ...]]


def _keep_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gradients.of_router_scores(grad, *ctx.saved_tensors)


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _experts_backward(gradient: Gradient, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mask, *weights = ctx.saved_tensors
    of_x, *of_weights = gradient(grad, x, mask, *weights, ctx.act)
    return of_x, None, *of_weights, None


def _keep_moe(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _moe_backward(gradient: Gradient, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v1, v2, *weights = ctx.saved_tensors
    mask = dynamic_k_select(router_scores(x, v1, v2), ctx.tau)
    of_x, *of_weights = gradient(grad, x, mask, *weights, ctx.act)
    return of_x, None, None, *of_weights, None, None


torch.library.register_autograd("sadmoe::router_scores", _router_backward, setup_context=_keep_router)
for _suffix, _gradient in (("", gradients.of_sparse_experts), ("_int8", gradients.of_sparse_experts_int8)):
    for _name, _backward, _keep in (
        ("sparse_experts", _experts_backward, _keep_experts),
        ("dynamic_k_moe", _moe_backward, _keep_moe),
    ):
        _backward = partial(_backward, _gradient)
        torch.library.register_autograd(f"sadmoe::{_name}{_suffix}", _backward, setup_context=_keep)


# --- FLOPs that were really executed (torch counts a multiply-add as two). Without data, as many as there can be.


def _pairs_flops(pairs: int, w_up: Tensor, w_down: Tensor, w_gate: Tensor | None) -> int:
    inputs = 1 if w_gate is None else 2
    return 2 * pairs * w_up.shape[1] * (inputs * w_up.shape[2] + w_down.shape[2])


def _executed(mask: Tensor) -> int:
    has_data = type(mask) in (Tensor, torch.nn.Parameter) and mask.device.type != "meta"
    return int(mask.sum()) if has_data else mask.numel()


@register_flop_formula(torch.ops.sadmoe.router_scores, get_raw=True)
def _router_flops(x: Tensor, v1: Tensor, v2: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.shape[0] * v1.shape[0] * (v1.shape[1] + v2.shape[0])


@register_flop_formula(torch.ops.sadmoe.sparse_experts, get_raw=True)
def _experts_flops(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Any = None,
    w_gate: Any = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _pairs_flops(_executed(mask), w_up, w_down, w_gate)


@register_flop_formula(torch.ops.sadmoe.sparse_experts_int8, get_raw=True)
def _int8_experts_flops(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Any,
    scale_down: Any,
    b_up: Any = None,
    w_gate: Any = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _experts_flops(x, mask, w_up, w_down, w_gate=w_gate)


@register_flop_formula(torch.ops.sadmoe.dynamic_k_moe, get_raw=True)
def _moe_flops(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Any = None,
    w_gate: Any = None,
    b_gate: Any = None,
    b_out: Any = None,
    tau: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> int:
    pairs = _executed(dynamic_k_select(router_scores(x, v1, v2), tau))
    return _router_flops(x, v1, v2) + _pairs_flops(pairs, w_up, w_down, w_gate)


@register_flop_formula(torch.ops.sadmoe.dynamic_k_moe_int8, get_raw=True)
def _int8_moe_flops(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Any,
    scale_down: Any,
    b_up: Any = None,
    w_gate: Any = None,
    scale_gate: Any = None,
    b_gate: Any = None,
    b_out: Any = None,
    scale_out: Any = None,
    tau: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _moe_flops(x, v1, v2, w_up, w_down, w_gate=w_gate, tau=tau)


# --- Autocast: activations and experts take autocast's dtype; the router stays as it is, for its float32 decisions.

_ROUTER_ARGUMENTS = {  # by position
    "router_scores": (1, 2),
    "sparse_experts": (),
    "dynamic_k_moe": (1, 2),
    "sparse_experts_int8": (),
    "dynamic_k_moe_int8": (1, 2),
}


def _cast(value: Any, device: str) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device
    return value.to(torch.get_autocast_dtype(device)) if floats else value


def _cast_all(name: str, args: tuple[Any, ...], device: str) -> list[Any]:
    kept = _ROUTER_ARGUMENTS[name]
    return [value if i in kept else _cast(value, device) for i, value in enumerate(args)]


def _autocast_rule(name: str, device: str) -> Callable[..., Tensor]:
    op = getattr(torch.ops.sadmoe, name)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        cast_kwargs = {key: _cast(value, device) for key, value in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*_cast_all(name, args, device), **cast_kwargs)

    return rule


_rules = torch.library.Library("sadmoe", "IMPL")
for _name in _ROUTER_ARGUMENTS:
    for _device in ("cpu", "cuda"):
        _rules.impl(_name, _autocast_rule(_name, _device), f"Autocast{_device.upper()}")


# --- Devices without a kernel.


IN_TORCH = "runs in plain torch, every expert computed: right, not fast"
WIDENED = "widens the weights at every call: right, not fast"


def _with_one_warning(
    name: str, function: Callable[..., Tensor], how: str = IN_TORCH
) -> Callable[..., Tensor]:
    warned: set[str] = set()

    @wraps(function)
    def fallback(*args: Any, **kwargs: Any) -> Tensor:
        device = args[0].device.type
        if device not in warned:
            warned.add(device)
            warnings.warn(
                f"sadmoe::{name} has no kernel for {device} and {how}",
                stacklevel=2,
            )
        return function(*args, **kwargs)

    return fallback


def _sparse_experts_widened(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    scale_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    experts = reference.dequantized_experts(
        x.dtype, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    )
    return sparse_experts(x, mask, *experts, act)


def _dynamic_k_moe_widened(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    scale_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    tau: float = 0.0,
    act: str = "relu",
) -> Tensor:
    """By the ops, so that the experts are those of `router_scores` and `dynamic_k_select` on the same device."""
    mask = dynamic_k_select(router_scores(x, v1, v2), tau)
    return _sparse_experts_widened(
        x, mask, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out, act
    )


_BY_TORCH: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    _ROUTER_SCORES: reference.router_scores,
    _DYNAMIC_K_SELECT: reference.dynamic_k_select,
    _SPARSE_EXPERTS: reference.sparse_experts,
    _DYNAMIC_K_MOE: reference.dynamic_k_moe,
    _SPARSE_EXPERTS_INT8: _sparse_experts_widened,
    _DYNAMIC_K_MOE_INT8: _dynamic_k_moe_widened,
}


def _in_plain_torch(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Tensor:
    """The op by `reference`, its arguments checked and cast as the op does."""
    name, device = _name_of(op), args[0].device.type
    for value in args:
        if isinstance(value, str) and value not in reference.ACTIVATIONS:
            raise RuntimeError(
                f"{name}: act must be one of {', '.join(reference.ACTIVATIONS)}, got {value!r}"
            )
        if isinstance(value, float | int) and not 0 <= value <= 1:
            raise RuntimeError(
                f"{name}: tau must be in [0, 1] (0: every expert, 1: the top expert), got {value}"
            )
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return _BY_TORCH[op](*args)
    with torch.autocast(device, enabled=False):
        return _BY_TORCH[op](*(_cast_all(name, args, device) if name in _ROUTER_ARGUMENTS else args))


def _name_of(op: torch._ops.OpOverload) -> str:
    return op._schema.name.removeprefix("sadmoe::")


_fallbacks = torch.library.Library("sadmoe", "IMPL")
_fallbacks.impl("_masked_activation_", reference.masked_activation_, "CompositeExplicitAutograd")
for _op, _by_torch in _BY_TORCH.items():
    _name = _name_of(_op)
    _why = (WIDENED,) if _name.endswith("_int8") else ()
    _fallbacks.impl(_name, _with_one_warning(_name, _by_torch, *_why), "CompositeExplicitAutograd")


# --- What was built, and which kernels run.


def build_info() -> str:
    """How the compiled ops were built, which CPU kernels run, and those that this processor can, fastest first."""
    sadmoe = torch.ops.sadmoe
    return f"{sadmoe._build_info()}; cpu kernels: {sadmoe._cpu_isa()} of {sadmoe._cpu_isas()}"


def cpu_isas() -> list[str]:
    """The instruction sets of the CPU kernels that this processor runs, fastest first."""
    return torch.ops.sadmoe._cpu_isas().split(", ")


def use_cpu_isa(isa: str) -> None:
    """Use one instruction set of `cpu_isas()` in the whole process, or "auto": for tests and benches."""
    torch.ops.sadmoe._use_cpu_isa(isa)


def cpu_isa() -> str:
    """The instruction set of the CPU kernels in use."""
    return torch.ops.sadmoe._cpu_isa()


def allow_tf32(allow: bool) -> None:
    """Whether tensor cores may multiply float32 experts on CUDA, operands rounded to 11 bits; at first they may not.

    For the whole process, like torch's own setting, which is not looked at. The router is always float32. Raises
    RuntimeError where sadmoe was built without CUDA kernels.
    """
    if "cuda: yes" not in build_info():
        raise RuntimeError(f"allow_tf32 is for CUDA kernels, and sadmoe was built without ({build_info()})")
    torch.ops.sadmoe._allow_tf32(allow)
