"""Routers trained by other losses than plain least squares: what selection needs, an error near the threshold or a
prediction that is too low, weighs more. For bench/ablations.py."""

from collections.abc import Callable
from typing import Any

import torch
from sadmoe import DynamicKMoE, reference, tau
from sadmoe.batches import Batches
from sadmoe.dial import converted_layers
from sadmoe.inputs import stream_inputs
from sadmoe.routers import RouterConfig, fit_router_
from torch import Tensor, nn
from tqdm import tqdm

NEAR = 8.0  # times the weight of an expert at the threshold
WIDE = 0.15  # how near to it that is, of the token's largest
UNDER = 4.0  # times the weight of a prediction that is too low
Weight = Callable[[Tensor, Tensor, float], Tensor]  # (scores, targets, tau) -> [T, E]


def plain(scores: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Least squares."""
    return torch.ones_like(scores)


def near_threshold(scores: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """More for experts whose target is near tau times the token's largest."""
    ratios = targets / targets.amax(-1, keepdim=True).clamp(min=1e-12)
    return 1 + (NEAR - 1) * torch.exp(-((ratios - threshold) / WIDE).square())


def under_prediction(scores: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """More where an expert may be left out that should run."""
    return torch.where(scores < targets, UNDER, 1.0)


def fit_by(
    model: nn.Module,
    batches: Batches,
    config: RouterConfig,
    max_tokens: int,
    weight: Weight,
    threshold: float,
) -> None:
    """`fit_routers_` with that weight on each squared error; goes on from what plain least squares gives."""
    layers = converted_layers(model)
    with tau(model, 0.0):
        for name, rows in stream_inputs(model, layers, batches, max_tokens=max_tokens):
            fit_router_(layers[name], rows, config)
            refine(layers[name], rows, config, weight, threshold)


def refine(layer: DynamicKMoE, rows: Tensor, config: RouterConfig, weight: Weight, threshold: float) -> None:
    """As many updates again, at a fifth of the rate."""
    generator = torch.Generator().manual_seed(config.seed)
    targets = torch.cat([layer.expert_norms(part) for part in rows.split(1024)]).pow(config.target_power)
    x_scale, y_scale = rows.square().mean().sqrt(), targets.mean()
    weights: Any = [
        (layer.router.v1.detach() * x_scale).requires_grad_(),
        (layer.router.v2.detach() / y_scale).requires_grad_(),
    ]
    optimizer = torch.optim.AdamW(weights, lr=config.lr / 5, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in tqdm(range(config.steps), "router", leave=False, disable=None):
        some = torch.randint(len(rows), (config.batch_tokens,), generator=generator)
        x, y = rows[some] / x_scale, targets[some] / y_scale
        scores = reference.router_scores(x, *weights)
        loss = (weight(scores.detach(), y, threshold) * (scores - y).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        layer.router.v1.copy_(weights[0] / x_scale)
        layer.router.v2.copy_(weights[1] * y_scale)
