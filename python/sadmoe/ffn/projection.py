"""The two-layer MLP in the place of a linear layer, by which a projection of attention becomes an FFN."""

from typing import cast

import torch
from torch import Tensor, nn

from sadmoe.checks import check_choice
from sadmoe.ffn.activations import ACTIVATION_MODULES, which_activation
from sadmoe.ffn.linears import bias_of, linear_shape
from sadmoe.ffn.lookup import lookup, put
from sadmoe.ffn.surgery import replaced_module
from sadmoe.modules import plain_name

_KEY = "original"  # in the MLP's __dict__: deepcopy takes it along, state_dict and modules() do not see it


class ProjectionMLP(nn.Module):
    """down(act(up(x))): a linear layer d -> d_out told anew with `width` neurons between (arXiv 2310.04361, 3.4).

    x [..., d] -> [..., d_out]. bias: of both layers. The linear layer that it stands for is kept beside it, see
    `stand_in` and `put_back_projections`.
    """

    def __init__(
        self,
        d: int,
        width: int,
        d_out: int,
        act: str = "relu",
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice("act", act, ACTIVATION_MODULES)
        self.up = nn.Linear(d, width, bias, device=device, dtype=dtype)
        self.act = ACTIVATION_MODULES[act]()
        self.down = nn.Linear(width, d_out, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    @property
    def act_name(self) -> str | None:
        """The key of `reference.ACTIVATIONS` of its activation, also after a swap; None for a foreign one."""
        return which_activation(self.act)


def empty_mlp(linear: nn.Module, width: int, act: str = "relu") -> ProjectionMLP:
    """An MLP of the shapes, dtype and device of a linear layer, with biases if that has one; untrained."""
    shape = linear_shape(linear)
    if shape is None:
        raise ValueError(f"a projection must be a linear layer, got a {type(linear).__name__}")
    weight = cast(Tensor, linear.weight)
    return ProjectionMLP(
        shape[0],
        width,
        shape[1],
        act,
        bias=bias_of(linear) is not None,
        device=weight.device,
        dtype=weight.dtype,
    )


def stand_in(model: nn.Module, name: str, mlp: ProjectionMLP, *, keep: bool = True) -> None:
    """Puts the MLP where the linear layer `name` is, in its training mode; keep: hold on to that, weights and all."""
    linear = lookup(model, name)[2]
    mlp.train(linear.training)
    if keep:
        mlp.__dict__[_KEY] = linear
    put(model, name, mlp)


def projection_mlps(model: nn.Module) -> dict[str, ProjectionMLP]:
    """The MLPs in the place of projections, by name without wrappers, converted or not, in the model's order."""
    found = {plain_name(name): _mlp_of(module) for name, module in model.named_modules()}
    return {name: mlp for name, mlp in found.items() if mlp is not None}


def original_of(mlp: ProjectionMLP) -> nn.Module | None:
    """The linear layer that the MLP stands for; None where it was loaded without."""
    return mlp.__dict__.get(_KEY)


def bare_mlps(model: nn.Module) -> dict[str, ProjectionMLP]:
    """The MLPs that are not converted."""
    return {plain_name(name): m for name, m in model.named_modules() if isinstance(m, ProjectionMLP)}


def has_originals(model: nn.Module) -> bool:
    """Whether every MLP, converted or not, knows the projection that it stands for."""
    return not _without_original(model)


def check_originals(model: nn.Module) -> None:
    """Raises ValueError unless every MLP, converted or not, knows the projection that it stands for."""
    if lost := _without_original(model):
        raise ValueError(
            f"the original projections of {', '.join(lost)} were not saved with the model: load its adapter onto the "
            "dense model instead (load_adapter), or keep the MLPs with restore_(model, projections=False)"
        )


def put_back_projections(model: nn.Module) -> None:
    """Puts the original linear layer where each (not converted) MLP is, with its own bits.

    Device, dtype, requires_grad and training mode become the MLP's. Raises ValueError, with nothing changed, where
    an original is not known.
    """
    check_originals(model)
    for name, mlp in bare_mlps(model).items():
        linear, like = cast(nn.Module, original_of(mlp)), mlp.up.weight
        linear.to(like.device, like.dtype).train(mlp.training)
        if cast(Tensor, linear.weight).requires_grad != like.requires_grad:
            linear.requires_grad_(like.requires_grad)
        put(model, name, linear)


def _without_original(model: nn.Module) -> list[str]:
    return [name for name, mlp in projection_mlps(model).items() if original_of(mlp) is None]


def _mlp_of(module: nn.Module) -> ProjectionMLP | None:
    whole = replaced_module(module)
    return next((m for m in (module, whole) if isinstance(m, ProjectionMLP)), None)
