"""What a conversion could save of a dense model, before anything is trained or changed."""

import math
from dataclasses import dataclass

from torch import nn
from tqdm.auto import tqdm

from sadmoe.attention import scan_projections
from sadmoe.batches import Batches, check_batches, length
from sadmoe.cost import neuron_flops
from sadmoe.ffn import FFNSite, Skipped, find_ffns, moe_layers, overlooked, scan_ffns
from sadmoe.ffn.linears import shape_of
from sadmoe.flops import FlopCount
from sadmoe.inputs import count_rows
from sadmoe.modules import check_model, refuse_compiled
from sadmoe.reference import RECTIFIERS
from sadmoe.sparsify import LayerSparsity, measure_sparsity
from sadmoe.tables import format_table, shortened, si

HEADER = ("FFN", "activation", "d x f", "of all FLOPs", "activations of 0", "below 1 % of the largest")
LISTED = 6  # reasons of each kind
SPARSE = 0.5  # share of activations that are 0 in every FFN of a model that is sparse


@dataclass(frozen=True)
class FFNShare:
    """One FFN. flops: a share of the whole model's. sparsity: what its activations are on the batches."""

    name: str
    act: str
    gated: bool
    d: int
    f: int
    flops: float
    sparsity: LayerSparsity

    def cells(self) -> tuple[str, ...]:
        """Its row under HEADER."""
        act = f"{self.act}, GLU" if self.gated else self.act
        sparsity = (f"{self.sparsity.zero:.1%}", f"{self.sparsity.small:.1%}")
        return self.name, act, f"{self.d} x {self.f}", f"{self.flops:.1%}", *sparsity


@dataclass(frozen=True)
class Survey:
    """What `convert_` finds in a model, and what of its FLOPs that is; prints as a table.

    flops: of all batches (multiply-adds, padding included), as the model runs; an FFN's are in closed form, as in
    `cost`. projections: a share of them, of attention's projections that ran, which `replace_projections_` would make
    convertible, and how many there are. parameters: of the model, and a share, of its FFNs. skipped, refused: FFNs and
    projections that cannot be, with the reason.
    """

    model: str
    flops: int
    ffns: tuple[FFNShare, ...]
    projections: float
    projection_count: int
    parameters: int
    ffn_parameters: float
    skipped: tuple[Skipped, ...]
    refused: tuple[str, ...]

    @property
    def share(self) -> float:
        """FLOPs of the FFNs over those of the whole model."""
        return sum(ffn.flops for ffn in self.ffns)

    @property
    def is_sparse(self) -> bool:
        """Whether half of the activations of every FFN or more are 0 as it is."""
        return all(ffn.sparsity.zero >= SPARSE for ffn in self.ffns)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {si(self.parameters)} parameters: {len(self.ffns)} FFNs have "
            f"{self.ffn_parameters:.1%} of them and {self.share:.1%} of the FLOPs on this data",
            f"if they cost nothing, the model would need {_fewer(self.share)}",
        ]
        if self.projection_count:
            lines[-1] += (
                f"; if its {self.projection_count} projections of attention (another {self.projections:.1%}, see "
                f"replace_projections_, --projections) cost nothing either, {_fewer(self.share + self.projections)}"
            )
        lines += ["", format_table(HEADER, [ffn.cells() for ffn in self.ffns]), "", self._advice()]
        lines += shortened([f"not converted: {skipped}" for skipped in self.skipped], LISTED)
        lines += shortened([f"not replaced: {reason}" for reason in self.refused], LISTED)
        return "\n".join(lines)

    def _advice(self) -> str:
        if self.is_sparse:
            return "half of the activations or more are 0: convert_ and calibrate_ may do as it is"
        few = "fewer than half of the activations are 0"
        if all(ffn.act in RECTIFIERS for ffn in self.ffns):
            return f"{few}: convert_ may do, as it is ReLU; sparsify_ (--sparsify) makes more of them 0"
        return f"{few}: sparsify_ (--sparsify) first"


def survey(model: nn.Module, batches: Batches, *, progress: bool = False) -> Survey:
    """Runs a dense model over batches, and says what converting it could save at most; the model is left as it was.

    batches: of what the model is for, as `convert_` takes them; of random data the shares of FLOPs are right, and the
    activations mean little. FFNs that they never run are `skipped`. Raises FFNNotFoundError and NotImplementedError as
    `find_ffns`, and ValueError where no FFN is run or the model is converted.
    """
    check_model(model)
    check_batches(batches)
    refuse_compiled(model)
    if moe_layers(model):
        raise ValueError(
            "survey takes a dense model, and this one is converted: sadmoe.cost(model, batches) tells"
        )
    sites, skipped = scan_ffns(model, batches=batches)
    if not sites:
        find_ffns(model, batches=batches)  # says why
    projections, refused = scan_projections(model, batches=batches)
    linears = [*(site.first for site in sites), *(p.linear for p in projections)]
    counted = FlopCount(model)
    rows = count_rows(model, linears, tqdm(batches, "FLOPs", length(batches), disable=not progress), counted)
    total = counted.flops
    idle = [site.name for site in sites if not rows[site.first]]
    if len(idle) == len(sites):
        raise ValueError(
            f"the batches never reach {', '.join(shortened(idle, 5))}: pass batches that run the FFNs"
        )
    skipped = [*skipped, *overlooked(model, sites, skipped), *(_idle(model, name) for name in idle)]
    sites = [site for site in sites if rows[site.first]]
    sparsities = measure_sparsity(model, batches, sites, progress=progress)
    ffns = tuple(
        _share_of(site, sparsity, rows[site.first] / total)
        for site, sparsity in zip(sites, sparsities, strict=True)
    )
    projections = [p for p in projections if rows[p.linear]]
    of_projections = sum(rows[p.linear] * math.prod(shape_of(p.linear)) for p in projections)
    weights = {
        id(p): p.numel() for site in sites for linear in site.linears.values() for p in linear.parameters()
    }
    parameters = sum(p.numel() for p in model.parameters())
    return Survey(
        type(model).__name__,
        total,
        ffns,
        of_projections / total,
        len(projections),
        parameters,
        sum(weights.values()) / parameters,
        tuple(skipped),
        tuple(refused),
    )


def _idle(model: nn.Module, name: str) -> Skipped:
    told = "these batches never run it: convert the others by a filter (--only), or give batches that do"
    return Skipped(name, type(model.get_submodule(name)).__name__, told)


def _share_of(site: FFNSite, sparsity: LayerSparsity, rows_of_flops: float) -> FFNShare:
    """rows_of_flops: rows that enter it, over the FLOPs of the whole model."""
    dense = site.dense()
    flops = dense.f * neuron_flops(dense.d, dense.d_out, site.act, dense.gated)
    return FFNShare(site.name, site.act, dense.gated, dense.d, dense.f, rows_of_flops * flops, sparsity)


def _fewer(share: float) -> str:
    """What a model needs that is spared so much of its FLOPs."""
    return f"{1 / (1 - share):.3g} times fewer FLOPs" if share < 0.999 else "none"
