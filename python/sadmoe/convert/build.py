"""The layers of a conversion, each built beside its FFN; nothing here touches the model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import Batches
from sadmoe.checks import named
from sadmoe.convert.config import ConvertConfig
from sadmoe.ffn import DenseFFN, FFNSite, layer_from_dense
from sadmoe.files import checksum
from sadmoe.inputs import stream_inputs
from sadmoe.layer import DynamicKMoE
from sadmoe.partition import partition, slots
from sadmoe.randomness import random_numbers_kept
from sadmoe.reference import RECTIFIERS
from sadmoe.routers import WIDTH, fit_router_
from sadmoe.sparsify.penalty import SMALL
from sadmoe.timing import Clock
from sadmoe.training.resume import Checkpoint, Kept

LOOKED_AT = 1024  # tokens of a layer by whose activity neurons are clustered, and the report's share and error measured


@dataclass
class Built:
    """A layer that is ready to be swapped in, and what its row of the report is made from."""

    site: FFNSite
    dense: DenseFFN
    layer: DynamicKMoE
    r2: float
    tokens: int
    sample: Tensor


def build_all(
    model: nn.Module,
    sites: list[FFNSite],
    batches: Batches,
    config: ConvertConfig,
    clock: Clock,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> list[Built]:
    """The layers in the order of the sites, those in the checkpoint loaded. Inputs are let go when a layer is built."""
    whole = 0 if checkpoint is None else checksum(dict(model.state_dict()))
    kept = {site.name: Kept(checkpoint, site.name, _made_from(site, config, whole)) for site in sites}
    built = {site.name: _loaded(site, config, *found) for site in sites if (found := kept[site.name].load())}
    by_name = {site.name: site for site in sites if site.name not in built}
    stream = stream_inputs(
        model,
        {name: site.first for name, site in by_name.items()},
        batches,
        max_tokens=config.max_tokens,
        max_bytes=config.max_bytes,
        seed=config.seed,
        skip_padding=config.skip_padding,
        progress=progress,
    )
    for _ in tqdm(by_name, "layers", disable=not progress):
        with clock("inputs"):
            name, inputs = next(stream)
        if len(inputs) < 2:
            raise ValueError(
                f"{name}: {len(inputs)} tokens of these batches reach it, padding left out, and 2 are the least: pass "
                "more batches, or leave it out by ConvertConfig(filter=...)"
            )
        built[name] = _build(by_name[name], inputs, config, clock, progress)
        kept[name].save(*_to_keep(built[name]))
    return [built[site.name] for site in sites]


def _build(site: FFNSite, inputs: Tensor, config: ConvertConfig, clock: Clock, progress: bool) -> Built:
    dense, config = site.dense(), config.of(site.adapter)
    experts = config.experts_of(dense.f)
    some = _sampled(inputs, config.seed)
    with clock("partition"), named(site.name):
        alike = _activity(dense, some) if config.cluster == "activity" else dense.first
        if not alike.isfinite().all():
            raise ValueError("not every activation is finite; look for NaN or inf in inputs or weights")
        labels = partition(alike, experts, seed=config.seed, progress=progress)
    with clock("routers"):
        layer = _layer(dense, slots(labels, experts), config)
        with named(site.name):
            fit = fit_router_(layer, inputs, config.router, progress=progress)
    return Built(site, dense, layer, fit.r2, len(inputs), some)


def _sampled(inputs: Tensor, seed: int) -> Tensor:
    """LOOKED_AT rows, drawn anew: inputs come in the order of the batches, whose first ones may be of a kind."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed), device="cpu")
    return inputs[order[:LOOKED_AT].to(inputs.device)]


def _layer(dense: DenseFFN, order: Tensor, config: ConvertConfig) -> DynamicKMoE:
    """The neurons in that order, under a router that is still to be fitted. The user's own random numbers stay as they
    are, though a new layer draws weights."""
    with random_numbers_kept(dense.w_up):
        return layer_from_dense(
            dense, order, config.experts_of(dense.f), config.router.width or WIDTH, config.gate
        )


# What is kept of a layer that was built: the order of its neurons, its router, and what its report is made from.


def _made_from(site: FFNSite, config: ConvertConfig, model: int) -> dict[str, Any]:
    """What that is a function of, but for the batches.   model: checksum of all that makes what enters the layer."""
    dense, config = site.dense(), config.of(site.adapter)
    names = ("cluster", "seed", "max_tokens", "skip_padding")
    return {
        "experts": config.experts_of(dense.f),
        "router": {
            **asdict(config.router),
            "width": config.router.width or WIDTH,
            "target_power": config.router.target_power or 1.0,
        },
        **{name: getattr(config, name) for name in names},
        "act": dense.act,
        "model": model,
    }


def _to_keep(one: Built) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"permutation": one.layer.permutation, "sample": one.sample, **one.layer.router.state_dict()}
    return tensors, {"r2": one.r2, "tokens": one.tokens}


def _loaded(site: FFNSite, config: ConvertConfig, tensors: dict[str, Tensor], state: dict[str, Any]) -> Built:
    dense, config = site.dense(), config.of(site.adapter)
    device = dense.w_up.device
    layer = _layer(dense, tensors["permutation"].to(device), config)
    layer.router.load_state_dict({name: tensors[name] for name in ("v1", "v2")})
    layer.router.target_power = config.router.target_power or 1.0
    return Built(site, dense, layer, state["r2"], state["tokens"], tensors["sample"].to(device))


def _activity(dense: DenseFFN, some: Tensor) -> Tensor:
    """[f, tokens], alike for neurons that count for the same tokens. With ReLU 1 where a neuron is above 1 % of the
    token's largest, else 0. With other activations, which are never off, the root of what the neuron adds to the
    output, |a_j| |w_down,j|, relative to the token's other neurons."""
    with torch.no_grad():
        hidden = dense.hidden(some).abs().float()
        if dense.act in RECTIFIERS:
            return (hidden > SMALL * hidden.amax(-1, keepdim=True)).t().to(torch.float32).contiguous()
        adds = hidden * dense.w_down.float().norm(dim=1)
        scale = adds.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return (adds / scale).sqrt().t().contiguous()
