"""One layer as a problem: its shape, weights, tokens, and the mask that they run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sadmoe import ops
from sadmoe.dial import converted_layers
from sadmoe.gates import DynamicK
from sadmoe.hooks import calls_seen
from torch import Tensor, nn

LAYERS = ["384x1536", "768x3072", "2048x8192", "576x1536-glu", "2048x8192-glu"]
ROUTER_WIDTH = 128


@dataclass(frozen=True)
class LayerShape:
    """A layer: plain with ReLU, or a GLU with SiLU."""

    d: int
    f: int
    s: int
    gated: bool = False

    @property
    def text(self) -> str:
        """As a file of recorded masks says it, and `of_text` reads."""
        return f"d={self.d} f={self.f} s={self.s} gated={self.gated}"

    @classmethod
    def of_text(cls, text: str) -> "LayerShape":
        found = re.fullmatch(r"d=(\d+) f=(\d+) s=(\d+) gated=(True|False)", text)
        if not found:
            raise SystemExit(f"no shape of a layer that record_masks.py writes: {text!r}")
        return cls(int(found[1]), int(found[2]), int(found[3]), gated=found[4] == "True")

    @property
    def name(self) -> str:
        """As `shape_of` reads it."""
        return f"{self.d}x{self.f}{'-glu' if self.gated else ''}"

    @property
    def experts(self) -> int:
        return self.f // self.s

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def act(self) -> str:
        return "silu" if self.gated else "relu"


def shape_of(text: str, s: int) -> LayerShape:
    found = re.fullmatch(r"(\d+)x(\d+)(-glu)?", text)
    if not found:
        raise SystemExit(f"--layers takes DxF or DxF-glu, as 768x3072 or 576x1536-glu, got {text!r}")
    return LayerShape(int(found[1]), int(found[2]), s, gated=bool(found[3]))


def tau_of_share(scores: Tensor, share: float) -> float:
    """The tau at which the executed share is the wanted one, to half a percent."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if ops.dynamic_k_select(scores, middle).float().mean() > share else (low, middle)
        )
    return high


def taus_at(model: nn.Module, batch: dict[str, Tensor], share: float) -> dict[str, float]:
    """Gives each layer in turn the tau of the share, on the inputs that it gets with the layers before at theirs."""
    found: dict[str, float] = {}

    def solve(name: str, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found[name] = tau_of_share(layer.router(args[0]).flatten(0, -2), share)
        layer.gate = DynamicK(found[name])

    with calls_seen(converted_layers(model), solve):
        model(**batch)
    return found


def weights(layer: LayerShape, dtype: torch.dtype, router_width: int = ROUTER_WIDTH) -> SimpleNamespace:
    """Of a layer and a random router. kept: what the ways to run it lay out anew, once."""
    g = torch.Generator().manual_seed(0)
    E, s, d, r = layer.experts, layer.s, layer.d, router_width

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    w = SimpleNamespace(E=E, act=layer.act, kept={}, v1=normal(r, d, scale=d**-0.5))
    w.v2 = normal(E, r, scale=r**-0.5)
    w.w_up, w.w_down = normal(E, s, d, scale=d**-0.5), normal(E, s, d, scale=layer.f**-0.5)
    w.b_up, w.b_out = normal(E, s, scale=0.1), normal(d, scale=0.1)
    w.w_gate, w.b_gate = (
        (normal(E, s, d, scale=d**-0.5), normal(E, s, scale=0.1)) if layer.gated else (None, None)
    )
    return w


def problem(w: SimpleNamespace, T: int, share: float) -> SimpleNamespace:
    """Weights, tokens, and the router's mask at the tau that gives the share."""
    g = torch.Generator().manual_seed(T)
    d, dtype = w.v1.shape[1], w.v1.dtype

    def scores(x: Tensor) -> Tensor:
        return ops.router_scores(x, w.v1, w.v2)

    x, others = (torch.randn(n, d, generator=g).to(dtype) for n in (T, 4096))
    tau = 0.0 if share == 1 else tau_of_share(scores(others), share)
    mask = ops.dynamic_k_select(scores(x), tau)
    return SimpleNamespace(**vars(w), x=x, tau=tau, mask=mask, routed=True)


def with_mask(p: SimpleNamespace, mask: Tensor) -> SimpleNamespace:
    """The same problem with a mask that is not its router's."""
    return SimpleNamespace(**vars(p) | {"mask": mask, "routed": False})


def copied(w: SimpleNamespace) -> SimpleNamespace:
    """The same weights in memory of their own."""
    own = {name: v.clone() if isinstance(v, Tensor) else v for name, v in vars(w).items()}
    return SimpleNamespace(**own | {"kept": {}})


def with_weights(p: SimpleNamespace, w: SimpleNamespace) -> SimpleNamespace:
    """The same problem with a copy of its weights."""
    return SimpleNamespace(**vars(p) | vars(w))


def kept(p: SimpleNamespace, name: str, make: Callable[[], Any]) -> Any:
    """Made once for a copy of the weights."""
    if name not in p.kept:
        p.kept[name] = make()
    return p.kept[name]


class Copies:
    """A layer's weights once for each variant: what the one before has left in the caches is of no use to it."""

    def __init__(self, w: SimpleNamespace) -> None:
        self.w, self.made = w, {}

    def of(self, p: SimpleNamespace, variant: object) -> SimpleNamespace:
        if variant not in self.made:
            self.made[variant] = copied(self.w)
        return with_weights(p, self.made[variant])
