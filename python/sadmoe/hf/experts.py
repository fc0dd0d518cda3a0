"""Stock mixtures of experts of transformers (Mixtral, Qwen-MoE and their like) on sadmoe's kernels.

After `import sadmoe`, `model.set_experts_implementation("sadmoe")` is enough. Only how the experts are computed
changes: the model's own top-k router still chooses, and `set_experts_tau` drops those of small weight. It needs
transformers 5.7, which first let others compute the experts. Before torch 2.13 a model must have run once before
`torch.compile` can trace it.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sadmoe import ops
from sadmoe.checks import check_number
from sadmoe.ffn.activations import which_activation

NAME = "sadmoe"
OLDEST = "5.7"  # transformers in which `set_experts_implementation` knows names of others
SEEN = 16  # values of a weight on the CPU, and two of each expert at least, to notice what wrote to it
_TAU, _ACT, _ACT_OF = "sadmoe_tau", "sadmoe_act", "sadmoe_act_of"  # in the __dict__ of an experts module

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# Beside the modules, not in them, where it would be saved and copied.
_kept: WeakKeyDictionary[nn.Module, tuple[list[ref[Tensor]], Any, Weights]] = WeakKeyDictionary()


def set_experts_tau(model: nn.Module, tau: float) -> None:
    """Stock MoE layers run, of the experts their router chose for a token, those of weight >= tau * the largest one.

    tau in [0, 1]: 0 runs all that were chosen, 1 the first alone. What is left is scaled up to the sum of the weights
    of all that were chosen. Switches the model to sadmoe's kernels; `model.set_experts_implementation("eager")` is the
    way back, of a class of your own `model.config._experts_implementation = "eager"`, and "sadmoe" in the same way
    lets tau act again. It is not saved with the model. `release_experts` frees the kernels' copies of the weights.
    Raises ValueError where tau is out of range or the model has no such layer, NotImplementedError where its experts
    compute what the kernels do not, or are spread over devices and tau is not 0, and before transformers 5.7.
    """
    check_number("tau", tau, " in [0, 1]")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1] (0: all experts chosen, 1: the first), got {tau}")
    layers = [module for module in model.modules() if _is_experts(module)]
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no layer whose experts can be run by others; a dense one takes convert_"
        )
    for layer in layers:
        _check(layer)
        if tau > 0 and _is_split(model, layer):
            raise NotImplementedError(
                "the experts of a token are on several devices, none of which knows the largest weight: "
                "use tau = 0, or a model that is not split by experts"
            )
    if TorchVersion(transformers.__version__) < OLDEST:
        raise NotImplementedError(
            f"transformers {transformers.__version__} lets nobody else compute experts: "
            f"pip install 'transformers>={OLDEST}'"
        )
    for owner in _outermost(model, "set_experts_implementation"):
        owner.set_experts_implementation(NAME)  # type: ignore[operator]
    for layer in layers:
        # transformers switches no class whose own file does not tell that it has experts, such as a user's subclass.
        layer.config._experts_implementation_internal = NAME  # type: ignore[union-attr]
        layer.__dict__[_TAU] = float(tau)


def release_experts(model: nn.Module) -> None:
    """Lets go of the copies of the experts' weights that the kernels read; the next call by them makes them anew.

    For after `model.set_experts_implementation("eager")`, or before training, which keeps none.
    """
    for module in model.modules():
        _kept.pop(module, None)


def _outermost(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules with that attribute that are in no other such one."""
    if hasattr(module, name):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, name)


def _is_split(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the experts are spread over devices, which older ones of transformers say of the whole model alone."""
    owners = [model, *_outermost(model, "set_experts_implementation")]
    told = [getattr(getattr(owner, "config", None), "distributed_config", None) for owner in owners]
    of_model = any(getattr(one, "enable_expert_parallel", False) for one in told)
    return of_model or bool(getattr(layer, "_is_expert_parallel", False))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """sum over k of top_k_weights[t, k] * expert top_k_index[t, k] of token t, as in every experts module.

    hidden_states [T, d], top_k_index int64 [T, k] (the number of experts, where it runs on another device),
    top_k_weights [T, k] -> [T, d]. Each (token, expert) pair is a row for the kernel, whose sum is unweighted.
    """
    known = self.__dict__.get(_ACT)
    act = known if known and self.__dict__.get(_ACT_OF) is self.act_fn else _check(self)
    weights, pairs = top_k_weights.float(), top_k_index.flatten()
    tau = self.__dict__.get(_TAU, 0.0)
    if tau > 0:
        kept = weights >= tau * weights.amax(-1, keepdim=True)
        left = (weights * kept).sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        weights = weights * (weights.sum(-1, keepdim=True) / left) * kept
        pairs = pairs.where(kept.flatten(), self.num_experts)
    here = pairs < self.num_experts
    mask = pairs.unsqueeze(1) == torch.arange(self.num_experts, device=pairs.device)
    rows = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0)
    w_up, w_down, w_gate, b_up, b_gate, b_down = _weights_of(self)
    y = ops.sparse_experts(rows, mask, w_up, w_down, b_up, w_gate, b_gate, act=act)
    if b_down is not None:
        y = y + b_down[pairs.where(here, 0)]
    if getattr(self, "has_post_expert_norm", False):  # older ones of transformers have no such norms
        y = self.post_expert_norm(y)
    weighted = y.float().view(*weights.shape, y.shape[-1]) * (weights * here.view_as(weights)).unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)


def _is_experts(module: nn.Module) -> bool:
    """Whether its class was decorated with transformers' use_experts_implementation."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_bias", "down_proj"))


def _has_gate(experts: Any) -> bool:
    return getattr(experts, "has_gate", hasattr(experts, "gate_up_proj"))  # not every transformers says


@torch.compiler.assume_constant_result
def _check(experts: Any) -> str:
    """The activation, noted for later calls. Raises NotImplementedError where the experts do what no kernel does."""
    kind = type(experts).__name__
    act = which_activation(experts.act_fn) if callable(getattr(experts, "act_fn", None)) else None
    default = getattr(type(experts)._apply_gate, "__module__", "") == "transformers.integrations.moe"
    if act is None or (_has_gate(experts) and not default):
        raise NotImplementedError(
            f"{kind} has an activation or a gating of its own, which sadmoe's kernels do not compute: "
            'use model.set_experts_implementation("grouped_mm")'
        )
    experts.__dict__[_ACT], experts.__dict__[_ACT_OF] = act, experts.act_fn
    return act


def _weights_of(experts: Any) -> Weights:
    """w_up, w_down, w_gate, b_up, b_gate [E, s, ...] and the down bias [E, d], contiguous, as the kernels read them.

    Kept for the next call, which takes the experts' memory again, as long as the weights are the same tensors and
    nothing wrote to them in place: what `.data` writes to a whole expert is seen on the CPU, where a few values of each
    are compared, but not on CUDA, which would have to be waited for. Made each time in training, where gradients pass
    through, and where accelerate brings the weights for a call and takes them away again.
    """
    names = ("gate_up_proj" if _has_gate(experts) else "up_proj", "down_proj")
    biases = tuple(f"{name}_bias" for name in names) if experts.has_bias else ()
    sources = [getattr(experts, name) for name in names + biases]
    training = torch.is_grad_enabled() and any(p.requires_grad for p in sources)
    if torch.compiler.is_compiling():
        return _in_layout(experts, *sources)
    if training or _are_brought(experts):
        _kept.pop(experts, None)
        return _in_layout(experts, *sources)
    key = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version, _some_of(p)) for p in sources]
    kept = _kept.get(experts)
    # What an adapter makes anew at every call may lie where the last one's did, but that one is gone.
    same = kept is not None and all(ref() is p for ref, p in zip(kept[0], sources, strict=True))
    if kept is None or not same or kept[1] != key:
        # Later calls may be others' than this one's: under inference_mode it would be of no use to any with gradients.
        with torch.inference_mode(False), torch.no_grad():
            kept = _kept[experts] = ([ref(p) for p in sources], key, _in_layout(experts, *sources))
    return kept[2]


def _are_brought(experts: nn.Module) -> bool:
    hook = getattr(experts, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def _some_of(weight: Tensor) -> list[float]:
    """Values by which a change is noticed that no version counts."""
    if weight.device.type != "cpu":
        return []
    by_expert = weight.detach().flatten(1)
    experts, entries = by_expert.shape
    return by_expert[:, :: max(1, entries // max(2, SEEN // experts))].flatten().tolist()


def _in_layout(
    experts: Any,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Weights:
    first = first.transpose(1, 2) if experts.is_transposed else first  # [E, s or 2 s, d]
    down = down if experts.is_transposed else down.transpose(1, 2)  # [E, s, d]
    if not _has_gate(experts):
        return first.contiguous(), down.contiguous(), None, first_bias, None, down_bias
    concatenated = getattr(experts, "is_concatenated", True)
    gate, up = _halves(first, concatenated)
    b_gate, b_up = (None, None) if first_bias is None else _halves(first_bias, concatenated)
    return up, down.contiguous(), gate, b_up, b_gate, down_bias


def _halves(both: Tensor, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of dimension 1, where they are one after the other, or take turns."""
    gate, up = both.chunk(2, dim=1) if concatenated else (both[:, ::2], both[:, 1::2])
    return gate.contiguous(), up.contiguous()


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
