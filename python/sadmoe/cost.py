"""What a converted model computes: FLOPs of each layer in closed form, and of the rest as it runs.

One multiply-add is one FLOP, by the rule of the paper's evaluation code, of which `flops.py` has the rest:

    dense FFN        (1 + gated) d f + f d_out,  + f for a GELU or SiLU (QuickGELU: 3 f),  + f for the product of a GLU
    router and gate  d r + r E + 4 E + 1,  + d_out for the output bias
    shared expert    d m + m d_out + 2 d_out,  of m neurons
    one expert       the dense FFN's with s for f,  + s for each input bias,  + d_out to add up outputs
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from tqdm.auto import tqdm

from sadmoe.batches import Batches, check_batches, length, run, samples_in, to_device
from sadmoe.checks import Filter
from sadmoe.dial import converted_layers
from sadmoe.flops import FlopCount
from sadmoe.layer import DynamicKMoE
from sadmoe.masks import LayerMasks, record_masks
from sadmoe.modules import device_of, evaluating
from sadmoe.randomness import SEED, seeded
from sadmoe.tables import format_table, si

ACTIVATION_FLOPS = {"relu": 0, "gelu": 1, "gelu_tanh": 1, "silu": 1, "quick_gelu": 3, "relu2": 0}


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one token in one converted layer."""

    name: str
    experts: int
    expert_size: int
    share: float  # executed (token, expert) pairs over all pairs
    tokens: float  # of a sample that enter the layer, padding included; 1 where that was not measured
    dense: float  # the FFN that the layer replaces
    router: float  # router, gate, shared expert and output bias, whatever the gate then runs
    pair: float  # one expert, with adding up its output
    combine: float  # of `executed`: adding up the outputs of the experts
    executed: float  # what is computed: `router` and the experts that ran; at tau = 0 `dense`, for no router is asked

    @property
    def all_experts(self) -> float:
        """Every expert through the sparse path: the limit of small tau."""
        return self.router + self.experts * self.pair

    @property
    def floor(self) -> float:
        """One expert, the least that dynamic-k can run."""
        return self.router + self.pair


@dataclass(frozen=True)
class CostReport:
    """FLOPs of one sample, or of one token where they follow from given shares; prints as a table.

    Padding that was computed is charged like any token, at the share of the real ones.
    `active_parameters`: all parameters outside the experts (embeddings and routers in full), and of the
    experts' own the share that was executed: what a token uses on average.
    """

    layers: tuple[LayerCost, ...]
    rest: float | None  # everything outside the converted layers; None where the model was not run
    parameters: int
    active_parameters: float

    @property
    def dense(self) -> float:
        """The converted layers, had they stayed dense."""
        return self._total("dense")

    @property
    def executed(self) -> float:
        """The converted layers as their gates stand."""
        return self._total("executed")

    @property
    def all_experts(self) -> float:
        """The converted layers with every expert run sparsely."""
        return self._total("all_experts")

    @property
    def floor(self) -> float:
        """The converted layers with one expert a token."""
        return self._total("floor")

    @property
    def share(self) -> float:
        """Executed pairs over all pairs, all layers together."""
        pairs = sum(layer.tokens * layer.experts for layer in self.layers)
        return sum(layer.tokens * layer.experts * layer.share for layer in self.layers) / pairs

    @property
    def of_dense(self) -> float:
        """FLOPs of the whole model over those of the dense one; of the converted layers alone where it was not run."""
        rest = self.rest or 0.0
        return (rest + self.executed) / (rest + self.dense)

    @property
    def layers_of_dense(self) -> float:
        """FLOPs of the converted layers over those of the FFNs that they replace: what a budget bounds."""
        return self.executed / self.dense

    def _total(self, what: str) -> float:
        return sum(layer.tokens * getattr(layer, what) for layer in self.layers)

    def __str__(self) -> str:
        header = ["layer", "experts", "share", "dense", "executed", "of dense"]
        header += ["all experts", "one expert", "router", "combine"]
        table = format_table(header, [*(_line(layer) for layer in self.layers), self._sum_line()])
        return "\n".join([f"FLOPs per token, by layer\n{table}", *self._footer()])

    def _sum_line(self) -> list[str]:
        unit = "all, per token" if self.rest is None else "all, per sample"
        parts = (self.executed, self.all_experts, self.floor, self._total("router"), self._total("combine"))
        return [unit, "", *_numbers(self.share, self.dense, parts)]

    def _footer(self) -> list[str]:
        lines = []
        if self.rest is not None:
            dense, executed = self.rest + self.dense, self.rest + self.executed
            lines.append(
                f"whole model, per sample: {si(executed)} executed of {si(dense)} dense "
                f"({self.of_dense:.1%}); least {(self.rest + self.floor) / dense:.1%}"
            )
        active = self.active_parameters / self.parameters
        lines.append(f"parameters: {si(self.parameters)}, active {si(self.active_parameters)} ({active:.1%})")
        return lines


def cost(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    shares: float | Mapping[str, float] | None = None,
    skip_padding: bool = True,
    progress: bool = False,
) -> CostReport:
    """What the converted model computes, measured on batches or computed for given shares.

    batches: the model runs them as its gates stand, in eval mode, and everything is counted, also outside the
    converted layers; the executed shares are those of the real tokens (skip_padding=False: of all).
    shares: the executed share of every layer, in (0, 1], one for all or by name; nothing is run.
    A gate on true norms is charged as if a router had told it, so that oracles compare at equal selection.
    Raises ValueError where nothing is converted, batches and shares are both given or both missing, batches never
    reach a converted layer, or shares name other layers or are out of range.
    """
    converted_layers(model)
    if (batches is None) == (shares is None):
        raise ValueError("give cost batches to run or shares to compute with, exactly one of them")
    if shares is not None:
        return cost_of_shares(model, shares)
    assert batches is not None
    check_batches(batches)
    device, samples, count = device_of(model), 0, FlopCount(model)
    with (
        seeded(model, SEED),  # a DataLoader gives all calls the same
        evaluating(model),
        record_masks(model, skip_padding=skip_padding) as record,
    ):
        for batch in tqdm(batches, "cost", length(batches), disable=not progress):
            batch = to_device(batch, device)
            samples += samples_in(batch)
            with record.batch(batch), count:
                run(model, batch)
    if samples == 0:
        raise ValueError("batches gave nothing: give at least one batch")
    return cost_of_masks(model, record.layers, samples, count.flops / samples)


def cost_of_masks(
    model: nn.Module,
    masks: Mapping[str, LayerMasks],
    samples: int,
    rest: float | None = None,
    *,
    filter: Filter | None = None,
) -> CostReport:
    """The report of what `record_masks` counted over that many samples, the gates still as they were. rest: see
    `CostReport`. filter: of a layer's name; False leaves it out."""
    layers = converted_layers(model, filter)
    if unused := [name for name in layers if masks[name].tokens == 0]:
        raise ValueError(
            f"the batches never reach {', '.join(unused)}: pass batches that run every converted layer"
        )
    costs = []
    for name, layer in layers.items():
        one = layer_cost(layer, masks[name].share, name=name, tokens=masks[name].rows / samples)
        costs.append(replace(one, executed=one.dense, combine=0.0) if layer.runs_all_experts else one)
    return _report(model, layers, costs, rest)


def neuron_flops(d: int, d_out: int, act: str, gated: bool) -> int:
    """FLOPs of one token in one neuron of a dense FFN, by the closed form above."""
    return (1 + gated) * d + d_out + gated + ACTIVATION_FLOPS[act]


def layer_cost(layer: DynamicKMoE, share: float, *, name: str = "", tokens: float = 1.0) -> LayerCost:
    """The closed forms above for one layer that asks its router, and executes `share` of its pairs."""
    experts, s, d = layer.w_up.shape
    d_out, r = layer.w_down.shape[2], layer.router.v1.shape[0]
    gated, b_out = layer.w_gate is not None, layer.b_out is not None
    neuron = neuron_flops(d, d_out, layer.act, gated)
    input_biases = (layer.b_up is not None) + (layer.b_gate is not None)
    shared = 0 if layer.shared is None else layer.shared.width * (d + d_out) + 2 * d_out
    router = d * r + r * experts + 4 * experts + 1 + d_out * b_out + shared
    pair = s * (neuron + input_biases) + d_out
    executed, combine = router + share * experts * pair, share * experts * d_out
    dense = experts * s * neuron
    return LayerCost(name, experts, s, share, tokens, dense, router, pair, combine, executed)


def cost_of_shares(
    model: nn.Module, shares: float | Mapping[str, float], *, filter: Filter | None = None
) -> CostReport:
    """The report of given shares, as `cost` takes them. filter: of a layer's name; False leaves it out."""
    layers = converted_layers(model, filter)
    by_name = shares if isinstance(shares, Mapping) else dict.fromkeys(layers, shares)
    if by_name.keys() != layers.keys():
        raise ValueError(
            f"shares must name the converted layers {', '.join(layers)}, got {', '.join(by_name) or 'none'}"
        )
    for name, share in by_name.items():
        if not 0 < share <= 1:
            raise ValueError(f"shares must be in (0, 1], got {share} for {name}")
    costs = [layer_cost(layer, by_name[name], name=name) for name, layer in layers.items()]
    return _report(model, layers, costs, None)


def _report(
    model: nn.Module, layers: Mapping[str, DynamicKMoE], costs: list[LayerCost], rest: float | None
) -> CostReport:
    parameters = sum(p.numel() for p in model.parameters())
    idle = sum((1 - c.share) * _expert_parameters(layers[c.name]) for c in costs)
    return CostReport(tuple(costs), rest, parameters, parameters - idle)


def _expert_parameters(layer: DynamicKMoE) -> int:
    of_experts = (layer.w_up, layer.w_gate, layer.w_down, layer.b_up, layer.b_gate)
    return sum(p.numel() for p in of_experts if p is not None)


def _line(layer: LayerCost) -> list[str]:
    parts = (layer.executed, layer.all_experts, layer.floor, layer.router, layer.combine)
    return [layer.name, f"{layer.experts} x {layer.expert_size}", *_numbers(layer.share, layer.dense, parts)]


def _numbers(share: float, dense: float, parts: tuple[float, ...]) -> list[str]:
    """parts: executed and whatever is shown as a ratio to dense."""
    return [f"{share:.1%}", si(dense), si(parts[0]), *(f"{part / dense:.1%}" for part in parts)]
