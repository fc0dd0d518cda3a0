"""Training of the routers: regression of every expert's output norm. Source: arXiv 2310.04361, section 3."""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe import reference
from sadmoe.batches import Batches
from sadmoe.checks import Filter, check_config, check_fields, check_range, named
from sadmoe.dial import converted_layers, tau
from sadmoe.files import checksum
from sadmoe.forward import without_autocast
from sadmoe.inputs import stream_inputs
from sadmoe.layer import DynamicKMoE, Router
from sadmoe.ops import DTYPES
from sadmoe.randomness import seeded
from sadmoe.training.guards import all_or_nothing
from sadmoe.training.resume import Checkpoint, Kept, check_checkpoint
from sadmoe.weights import check_own_weights, check_router_parameters

HELD_OUT = 0.1  # share of the tokens that training never sees
ACTIVATIONS = 2**22  # activations held at once while norms are computed
WIDTH = 128  # of a new router
REPORTED_SHARE = 0.25  # executed share at which `captured` is reported


@dataclass(frozen=True)
class RouterConfig:
    """How the router of a layer is trained. Width, optimiser and loss are the paper's; the length is ours.

    width: r, neurons between the two layers (the paper uses 512 for a 2-billion-parameter model). None: those that the
        router has, of a new one 128.
    steps: updates of the weights.
    batch_tokens: tokens in each update.
    lr: AdamW's rate at the start, down to 0 along a cosine; inputs and targets are scaled for it.
    target_power: the router predicts norm ** target_power, and tau compares that: 0.1 at power 0.5 is 0.01 on norms.
        None: what the router predicts already, so that tau goes on to mean the same; of a new one 1, the paper's.
        Below 1, small norms weigh more in the loss: measured on MiniLM made sparse, 8 neurons an expert, a third of the
        experts run: 0.5 closes half of the gap in output error between the routers and the true norms, 0.25 most of
        it; at 32 neurons an expert it makes no difference.
    weight_decay: AdamW's, as in the paper's text models.
    seed: of the initial weights, the held-out tokens and the order of the tokens; in `fit_routers_` also of which
        tokens are taken where there are more than max_tokens, and of the order in which a DataLoader shuffles.
    """

    width: int | None = None
    steps: int = 1000
    batch_tokens: int = 512
    lr: float = 5e-3
    target_power: float | None = None
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "width", "steps", "batch_tokens", least=1)
        check_range(self, "lr", above=0)
        check_range(self, "weight_decay", least=0)
        if self.target_power is not None and not 0 < self.target_power <= 2:
            raise ValueError(f"RouterConfig: target_power must be in (0, 2], got {self.target_power}")


@dataclass(frozen=True)
class RouterFit:
    """How well a router predicts the norms of tokens it was not trained on.

    r2: 1 - SSE / SST over all held-out (token, expert) pairs of targets (norm ** target_power), SST around
    their common mean; nan where all are equal. loss: their mean squared error. captured: the share of the sum
    of all squared norms that sits in the experts dynamic-k runs, with the tau that runs a quarter of the
    pairs; captured_oracle: the same for the same rule on the true norms, a mark for what a router can reach.
    Between target powers, compare `captured`, not r2.
    """

    r2: float
    loss: float
    captured: float
    captured_oracle: float
    tokens: int  # trained on
    held_out: int


def fit_router_(
    layer: DynamicKMoE, inputs: Tensor, config: RouterConfig | None = None, *, progress: bool = False
) -> RouterFit:
    """Trains `layer.router` in place to predict `layer.expert_norms`; nothing else in the layer changes.

    Least squares over (token, expert) pairs, AdamW, cosine down to 0, gradients clipped to 1. Training is in
    float32 from fresh weights and with its own random numbers: the result depends on layer, inputs and
    config. inputs [n, d]: tokens as they enter the dense FFN, n >= 2; a tenth is held out for the returned
    `RouterFit`. Source: arXiv 2310.04361, section 3; targets by Gram matrices, see
    `DynamicKMoE.expert_norms`. Raises ValueError where inputs have another shape or dtype, or config another width than
    the layer's router. Whatever is raised, the router is as it was.
    """
    config = RouterConfig() if config is None else check_config(config, RouterConfig)
    _check_fit(layer, inputs, config)
    inputs = inputs.detach() if inputs.dtype in DTYPES else inputs.detach().float()
    power = power_of(layer.router, config.target_power)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(inputs.device):
        problem = _Problem.of(layer, inputs, power)
        order = torch.randperm(len(inputs), generator=generator, device="cpu")
        held_out, train = order.tensor_split([math.ceil(HELD_OUT * len(inputs))])
        v1, v2 = (_fresh(v, generator) for v in (layer.router.v1, layer.router.v2))
        _train(v1, v2, problem, train, config, generator, progress)
        with all_or_nothing(layer.router), torch.no_grad():
            layer.router.v1.copy_(v1 / problem.x_scale)
            layer.router.v2.copy_(v2 * problem.y_scale)
            scores = torch.cat([layer.router(x) for x in inputs[held_out].split(config.batch_tokens)])
            fit = _judge(scores, problem.norms[held_out], power, tokens=len(train))
    layer.router.target_power = power
    return fit


def fit_routers_(
    model: nn.Module,
    batches: Batches,
    config: RouterConfig | None = None,
    *,
    filter: Filter | None = None,
    max_tokens: int = 20_000,
    max_bytes: int = 2**30,
    skip_padding: bool = True,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> dict[str, RouterFit]:
    """Trains the routers of a converted model anew: `fit_router_` on what enters each layer at tau = 0.

    config: its width is not asked for, each router keeps its own.   filter: of a layer's name; False leaves its router
    as it is, as that of a layer that the batches never run.   max_tokens, max_bytes, skip_padding: see `stream_inputs`.
    Gates stay as they are.
    checkpoint: where to resume from after a kill: routers that were done are loaded, see `Checkpoint`.
    Raises ValueError where nothing was converted, where a layer is inside an adapter, sharded or on the meta device,
    or where inputs are not finite. Whatever is raised, the routers are as they were.
    """
    check_checkpoint(checkpoint)
    layers = converted_layers(model, filter)
    check_own_weights(model, layers)
    for name, layer in layers.items():
        check_router_parameters(layer, name)
    config = RouterConfig() if config is None else check_config(config, RouterConfig)
    configs = {
        name: replace(
            config,
            width=len(layer.router.v1),
            target_power=power_of(layer.router, config.target_power),
        )
        for name, layer in layers.items()
    }
    whole = 0 if checkpoint is None else checksum(_all_but_routers(model))
    acts = {name: layer.act for name, layer in converted_layers(model).items()}
    told = {"max_tokens": max_tokens, "skip_padding": skip_padding, "model": whole, "acts": acts}
    kept = {name: Kept(checkpoint, name, {"config": asdict(configs[name]), **told}) for name in layers}
    routers = nn.ModuleList(layer.router for layer in layers.values())
    with (
        all_or_nothing(routers),
        tau(model, 0.0),
        seeded(model, config.seed),  # a DataLoader may draw
    ):
        fits = {}
        for name, layer in layers.items():
            if found := kept[name].load():
                layer.router.load_state_dict(found[0])
                layer.router.target_power = power_of(layer.router, configs[name].target_power)
                fits[name] = RouterFit(**found[1])
        stream = stream_inputs(
            model,
            {name: layer for name, layer in layers.items() if name not in fits},
            batches,
            max_tokens=max_tokens,
            max_bytes=max_bytes,
            seed=config.seed,
            skip_padding=skip_padding,
            progress=progress,
        )
        for name, x in stream:
            with named(name):
                fits[name] = fit_router_(layers[name], x, configs[name], progress=progress)
            kept[name].save(layers[name].router.state_dict(), asdict(fits[name]))
    return {name: fits[name] for name in layers}


def power_of(router: Router, asked: float | None) -> float:
    """What the router is to predict: as asked, or as before."""
    return router.target_power if asked is None else asked


def _all_but_routers(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, of which no router is."""
    return {name: t for name, t in model.state_dict().items() if "router" not in name.split(".")}


@dataclass(frozen=True)
class _Problem:
    """The regression: inputs [n, d] -> targets [n, E], norms ** power, each divided by a scale for the optimiser.

    The scales are powers of two, so that folding them back into the weights rounds nothing.
    """

    inputs: Tensor
    norms: Tensor
    targets: Tensor
    x_scale: float
    y_scale: float

    @staticmethod
    def of(layer: DynamicKMoE, inputs: Tensor, power: float) -> "_Problem":
        rows = max(1, ACTIVATIONS // (layer.experts * layer.expert_size))
        # Of the experts; inputs that ran under autocast may be of another.
        dtype = (layer.w_up if layer.scale_up is None else layer.scale_up).dtype
        norms = torch.cat([layer.expert_norms(x.to(dtype)) for x in inputs.split(rows)])
        if not norms.isfinite().all():
            raise ValueError(
                "inputs: not every expert's output norm is finite; look for NaN or inf in inputs or weights"
            )
        targets = norms.pow(power)
        x_scale, y_scale = inputs.float().square().mean().sqrt(), targets.mean()
        return _Problem(inputs, norms, targets, _power_of_two(x_scale), _power_of_two(y_scale))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[rows].float() / self.x_scale, self.targets[rows] / self.y_scale


def _check_fit(layer: DynamicKMoE, inputs: Tensor, config: RouterConfig) -> None:
    check_router_parameters(layer, "the layer")  # which are written to
    width, d = layer.router.v1.shape
    if inputs.dim() != 2 or inputs.shape[1] != d or len(inputs) < 2 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be floating point [n, {d}] with n >= 2, got {inputs.dtype} {list(inputs.shape)}: "
            "pass the tokens that enter this FFN, see sadmoe.inputs.stream_inputs, some of which must not be padding"
        )
    if config.width not in (None, width):
        raise ValueError(
            f"config.width is {config.width}, but the layer's router has width {width}: leave it out, or build the "
            f"layer with router_width={config.width}"
        )


def _power_of_two(scale: Tensor) -> float:
    """The power of two nearest to a positive scale in the logarithm, 1 for 0."""
    return 2.0 ** round(math.log2(scale.item())) if scale > 0 else 1.0


def _fresh(weight: Tensor, generator: torch.Generator) -> Tensor:
    """torch's initialisation of a linear layer, in float32, from the given random numbers."""
    fresh = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
    return fresh.to(weight.device).requires_grad_()


def _train(
    v1: Tensor,
    v2: Tensor,
    problem: _Problem,
    train: Tensor,
    config: RouterConfig,
    generator: torch.Generator,
    progress: bool,
) -> None:
    optimizer = torch.optim.AdamW([v1, v2], lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    size = min(config.batch_tokens, len(train))
    order = train[:0]
    for _ in tqdm(range(config.steps), "router", disable=not progress, leave=False):
        if len(order) < size:
            order = train[torch.randperm(len(train), generator=generator, device="cpu")]
        rows, order = order[:size].to(v1.device), order[size:]
        x, y = problem.at(rows)
        optimizer.zero_grad()
        F.mse_loss(reference.router_scores(x, v1, v2), y).backward()
        nn.utils.clip_grad_norm_([v1, v2], 1.0)
        optimizer.step()
        schedule.step()


def _judge(scores: Tensor, norms: Tensor, power: float, tokens: int) -> RouterFit:
    targets = norms.pow(power)
    sse, sst = (scores - targets).square().sum(), (targets - targets.mean()).square().sum()
    return RouterFit(
        r2=(1 - sse / sst).item() if sst > 0 else math.nan,
        loss=(sse / norms.numel()).item(),
        captured=_captured(scores, norms),
        captured_oracle=_captured(norms, norms),
        tokens=tokens,
        held_out=len(norms),
    )


def _captured(scores: Tensor, norms: Tensor) -> float:
    """Share of the squared norms in what dynamic-k runs on these scores, at REPORTED_SHARE of the pairs."""
    most = scores.amax(dim=-1, keepdim=True)
    ratios = (scores / most).where(most > 0, 1.0)  # of scores that are all 0 every expert runs
    runs = max(1, round(REPORTED_SHARE * ratios.numel()))
    chosen = ratios.flatten().topk(runs).indices
    energy = norms.flatten().square()
    return (energy[chosen].sum() / energy.sum()).item() if energy.any() else 1.0
