"""Where an FFN sits in a model: the parts of it, by path, and the linear layers themselves."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from sadmoe import reference
from sadmoe.checks import check_choice
from sadmoe.ffn.dense import DenseFFN
from sadmoe.ffn.linears import bias_of, linear_shape, weight_rows, why_not_plain
from sadmoe.ffn.lookup import join, lookup
from sadmoe.modules import plain_name

NO_PARENT = "the model itself is the FFN, so nothing can hold the layer; wrap it: nn.Sequential(ffn)"


@dataclass(frozen=True)
class Parts:
    """The parts of an FFN, as paths inside one module, its block.

    at: where the MoE layer goes ("" = in place of the block).   up, gate, down: the linear layers; a linear
    layer that computes gate and up in one is both, and gate_half says which half of its output is the gate
    ("first", "second"). activation: module or function attribute, None where forward calls a function.
    removed: what else becomes a passthrough, or 0, when the MoE layer goes in.
    """

    at: str
    up: str
    down: str
    gate: str | None = None
    gate_half: str | None = None
    activation: str | None = None
    removed: tuple[str, ...] = ()


@dataclass
class FFNSite:
    """One FFN of a model.

    adapter: row of `ADAPTERS` that found it.   act: its activation.
    dropout: probability on its output, where the MoE layer has to do it.   up, down, gate: its linear layers.
    keeps_dropout: a call of dropout between them could not be taken out, and acts on the output once it is converted.
    block: path of the module that `parts` is relative to.
    """

    block: str
    parts: Parts
    adapter: str
    act: str
    dropout: float
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    keeps_dropout: bool = False

    @property
    def name(self) -> str:
        """Module path where the MoE layer is put, without wrappers."""
        return plain_name(join(self.block, self.parts.at))

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Its linear layers by role: up, gate and down; one that is gate and up in one stands under both."""
        roles = {"up": self.up, "gate": self.gate, "down": self.down}
        return {role: linear for role, linear in roles.items() if linear is not None}

    @property
    def first(self) -> nn.Module:
        """The linear layer whose input is the FFN's input and whose output holds the pre-activation."""
        return self.up if self.gate is None else self.gate

    def pre_activation(self, output_of_first: Tensor) -> Tensor:
        """[..., f]: what the activation sees: all of the output of `first`, unless that is gate and up."""
        if self.parts.gate_half is None:
            return output_of_first
        return output_of_first.chunk(2, dim=-1)[0 if self.parts.gate_half == "first" else 1]

    def dense(self) -> DenseFFN:
        """The FFN as a value: detached views of the live weights."""
        w_up, b_up = weight_rows(self.up), bias_of(self.up)
        w_gate = b_gate = None
        if self.gate is not None:
            w_gate, b_gate = weight_rows(self.gate), bias_of(self.gate)
        if self.parts.gate_half is not None:
            gate, up = (0, 1) if self.parts.gate_half == "first" else (1, 0)
            w_gate, w_up = w_up.chunk(2)[gate], w_up.chunk(2)[up]
            if b_up is not None:
                b_gate, b_up = b_up.chunk(2)[gate], b_up.chunk(2)[up]
        return DenseFFN(
            act=self.act,
            w_up=w_up,
            w_down=weight_rows(self.down).t(),
            b_up=b_up,
            w_gate=w_gate,
            b_gate=b_gate,
            b_out=bias_of(self.down),
            dropout=self.dropout,
            trainable=self._trainable(),
        )

    def _trainable(self) -> frozenset[str]:
        names = set()
        for role, linear in self.linears.items():
            for name, p in linear.named_parameters(recurse=False):
                field = f"w_{role}" if name == "weight" else "b_out" if role == "down" else f"b_{role}"
                names |= {field} if p.requires_grad else set()
        return frozenset(names)


def site_of_parts(block: nn.Module, name: str, parts: Parts, adapter: str, act: str) -> FFNSite:
    """The site with its linear layers looked up in `block`; its dropout is 0."""
    up, down = block.get_submodule(parts.up), block.get_submodule(parts.down)
    gate = None if parts.gate is None else block.get_submodule(parts.gate)
    return FFNSite(name, parts, adapter, act, 0.0, up, down, gate)


def block_path(name: str, parts: Parts) -> str:
    """Path of the block whose FFN has its MoE layer at `name`."""
    return name.removesuffix(parts.at).removesuffix(".")


def spec(site: FFNSite) -> dict[str, Any]:
    """The site as what json can write, for `site_from_spec`.

    Its paths are relative to the block, so they still hold where the model is a part of another one.
    """
    parts = asdict(site.parts)
    return {
        "adapter": site.adapter,
        "act": site.act,
        "dropout": site.dropout,
        **parts,
        "removed": list(parts["removed"]),
    }


def site_from_spec(model: nn.Module, name: str, spec: dict[str, Any]) -> FFNSite:
    """The site that `spec` described, in a freshly built dense model of the same architecture, on any device.

    name: where the MoE layer goes. Raises ValueError where the spec is damaged or the model is another one.
    """
    keys = set(Parts.__dataclass_fields__) | {"adapter", "act", "dropout"}
    if not isinstance(spec, dict) or set(spec) != keys:
        got = sorted(spec) if isinstance(spec, dict) else type(spec).__name__
        raise ValueError(f"{name}: spec must be a dict with {', '.join(sorted(keys))}, got {got}")
    check_choice(f"{name}: act", spec["act"], reference.ACTIVATIONS)
    parts = _parts_from_spec(name, spec)
    if parts.at and name != parts.at and not name.endswith(f".{parts.at}"):
        raise ValueError(f"{name}: the name must end with {parts.at!r}, where its block holds the layer")
    block = block_path(name, parts)
    try:
        site = site_of_parts(model.get_submodule(block), block, parts, spec["adapter"], spec["act"])
        for path in parts.removed:
            lookup(model.get_submodule(block), path)
    except AttributeError as error:
        raise ValueError(
            f"{name}: not in this {type(model).__name__}, which is not the model saved: {error}"
        ) from error
    site.dropout = float(spec["dropout"])
    if site.dropout and (dropout := output_dropout(model.get_submodule(block), parts)):
        site.dropout = dropout.p  # this model's config may have another one than that of the model saved
    _check_shapes(site)
    return site


def output_dropout(block: nn.Module, parts: Parts) -> nn.Dropout | None:
    """Of a block that goes whole, and has a dropout on its output, the module that it is; None where several may be."""
    found = [m for m in block.modules() if isinstance(m, nn.Dropout)] if parts.at == "" else []
    return found[0] if len(found) == 1 else None


def _parts_from_spec(name: str, spec: dict[str, Any]) -> Parts:
    optional = ("gate", "gate_half", "activation")
    paths = {k: spec[k] for k in ("at", "up", "down", *optional)}
    wrong = [k for k, v in paths.items() if not isinstance(v, str) and not (v is None and k in optional)]
    if not isinstance(spec["adapter"], str):
        wrong.append("adapter")
    if not isinstance(spec["dropout"], (int, float)) or not 0 <= spec["dropout"] <= 1:
        wrong.append("dropout")
    removed = spec["removed"]
    if not isinstance(removed, (list, tuple)) or not all(isinstance(p, str) for p in removed):
        wrong.append("removed")
    if spec["gate_half"] not in (None, "first", "second") or (
        spec["gate_half"] and spec["gate"] != spec["up"]
    ):
        wrong.append("gate_half")
    if wrong:
        raise ValueError(f"{name}: spec is damaged at {', '.join(f'{k} = {spec[k]!r}' for k in wrong)}")
    return Parts(**paths, removed=tuple(removed))


def _check_shapes(site: FFNSite) -> None:
    shapes = []
    for role, linear in site.linears.items():
        reason = "is no linear layer" if linear_shape(linear) is None else why_not_plain(linear)
        if reason is not None:
            raise ValueError(f"{site.name}: {role}, {getattr(site.parts, role)}, {reason}")
        shapes.append(linear_shape(linear))
    try:
        site.dense()
    except ValueError as error:
        raise ValueError(f"{site.name}: linear layers {shapes} make no FFN: {error}") from error
