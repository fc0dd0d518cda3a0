"""Low-rank compensation: a small expert that every token runs predicts what skipped experts would have added."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import add, index
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from sadmoe.batches import Batches
from sadmoe.checks import Filter, named
from sadmoe.dial import converted_layers
from sadmoe.forward import without_autocast
from sadmoe.gates import DynamicK
from sadmoe.inputs import CHUNK, held_out_and_batches, stream_inputs
from sadmoe.layer import DynamicKMoE, SharedExpert
from sadmoe.layer.shared import Scales
from sadmoe.modules import evaluating, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.undo import surgery
from sadmoe.weights import check_own_weights, check_parameters

RIDGES = (1e-3, 1e-2, 1e-1)  # for inputs of variance 1; which one predicts held-out tokens best is seen
PARTS = (0.25, 0.5, 0.75)  # of the tau fitted to, at which it is seen how much of it is missing


def compensate_(
    model: nn.Module,
    batches: Batches,
    *,
    rank: int = 8,
    filter: Filter | None = None,
    max_tokens: int = 20_000,
    skip_padding: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Gives every converted layer that skips experts a shared one, which predicts what these would have added.

    For models that were converted and not fine-tuned. What a layer lacks is regressed on what enters it, in closed
    form: linear, of that rank, with a bias. A `SharedExpert` of 2 rank neurons computes it, for z = relu(z) - relu(-z),
    beside the chosen experts at any tau > 0. At tau = 0 the model is still the dense one, which `restore_` gives back.

    It takes the gates as they stand, so set tau or calibrate first. It fits that tau best; below it less of it is
    added, as much as was missing at a quarter, a half and three quarters of tau, and above it as much as there. Layer
    after layer, on what enters it where those before it have theirs: the model runs over the batches once for each. A
    shared expert that a layer has is replaced; where nothing that was fitted helps on held-out tokens it gets none.

    Returns by layer the share of the squared error of its output, on held-out tokens, that is gone.

    rank: 8 are 1 % of the FLOPs of an FFN of 384 x 1,536, and half as many of one of 768 x 3,072.   batches: as in
    `convert_`; in several processes each must be given the same.   filter: of a layer's name; False leaves it as it
    is.   max_tokens, skip_padding, seed: of the tokens of each layer, see `stream_inputs`; a tenth of them is held out.
    Source: reduced-rank regression (Izenman 1975, doi 10.1016/0047-259X(75)90042-1), with a ridge. ZeroQuant-V2 (arXiv
    2303.08302) does so for rounded weights.
    Raises ValueError where nothing is converted, every layer runs all experts, rank is below 1, weights of a layer are
    not just its own, or what it computes of fewer than two tokens, or not finite. Whatever is raised, the model is as
    it was.
    """
    if not isinstance(rank, SupportsIndex):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if index(rank) < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    refuse_distributed(model)
    layers = converted_layers(model, filter)
    check_own_weights(model, layers)
    check_parameters(layers)
    skipping = {name: layer for name, layer in layers.items() if not layer.runs_all_experts}
    if not skipping:
        raise ValueError("every expert runs, so nothing is to be made up for: set_tau or calibrate_ first")
    gone: dict[str, float] = {}
    with surgery(model), seeded(model, seed):  # a DataLoader may draw
        for layer in skipping.values():
            layer.shared = None
        stream = stream_inputs(
            model, skipping, batches, max_tokens=max_tokens, max_bytes=1, seed=seed, skip_padding=skip_padding,
            progress=progress,
        )  # fmt: skip
        for name, x in stream:
            with named(name), without_autocast(x.device):
                skipping[name].shared, gone[name] = _fitted(skipping[name], x, rank)
    return {name: gone[name] for name in skipping}


def _fitted(layer: DynamicKMoE, x: Tensor, rank: int) -> tuple[SharedExpert | None, float]:
    """The shared expert of a layer that x [n, d] enters, and the share of the squared error of held-out tokens that it
    takes away; None and 0 where it would take none."""
    x = x[
        torch.randperm(len(x), device="cpu").to(x.device)
    ]  # neighbours are alike, and texts may come by length
    x = x.to((layer.w_up if layer.scale_up is None else layer.scale_up).dtype)
    missed = _missed(layer, x)
    if not missed.isfinite().all():
        raise ValueError("not every output is finite; look for NaN or inf in inputs or weights")
    test, parts = held_out_and_batches("compensation", {"x": x, "missed": missed}, CHUNK)
    errors: dict[SharedExpert | None, float] = {None: test["missed"].double().square().sum().item()}
    for shared in _regressions([(part["x"], part["missed"]) for part in parts], rank):
        shared.requires_grad_(layer.trains("w_down"))
        with torch.no_grad():
            errors[shared] = (test["missed"].double() - shared(test["x"])).square().sum().item()
    best = min(errors, key=errors.__getitem__)
    if best is None:
        return None, 0.0
    best.power = layer.router.target_power
    best.scales = _scales(layer, x[:CHUNK], best)
    best.train(layer.training)
    return best, 1 - errors[best] / errors[None]


def _missed(layer: DynamicKMoE, x: Tensor) -> Tensor:
    """What skipped experts would add for x [n, d]: [n, d_out]."""
    with evaluating(layer):
        return torch.cat([layer.dense(part) - layer(part) for part in x.split(CHUNK)])


def _scales(layer: DynamicKMoE, x: Tensor, shared: SharedExpert) -> Scales:
    """How much of the shared expert is missing at which tau, by least squares over x [n, d]."""
    gate = layer.gate
    if type(gate) is not DynamicK:
        return shared.scales
    with torch.no_grad():
        whole = shared(x).double()
    scales = [(0.0, 0.0)]
    for part in PARTS:
        layer.gate = replace(gate, tau=gate.tau * part)
        scale = (_missed(layer, x) * whole).sum() / whole.square().sum()
        scales.append((shared.compared(layer.gate, shared.power), scale.clamp(0, 1).item()))
    layer.gate = gate
    return (*scales, (shared.compared(gate, shared.power), 1.0))


def _regressions(parts: Sequence[tuple[Tensor, Tensor]], rank: int) -> Iterator[SharedExpert]:
    """Of tokens x [n, d] and what they lack, y [n, d_out], in parts: y ~ x a b + bias, a [d, rank], for every ridge."""
    sums: tuple[Any, ...] = (0, 0, 0, 0)
    for part in parts:
        x, y = (rows.double() for rows in part)
        sums = tuple(map(add, sums, (x.sum(0), y.sum(0), x.T @ x, x.T @ y)))
    x_mean, y_mean, squares, products = (value / sum(len(x) for x, _ in parts) for value in sums)
    squares, products = squares - x_mean.outer(x_mean), products - x_mean.outer(y_mean)
    scale = squares.diagonal().clamp(min=0).sqrt()
    scale = scale.where(scale > 1e-6 * scale.max(), 1.0)  # of what does not vary
    squares, products = squares / scale.outer(scale), products / scale.unsqueeze(1)
    for ridge in RIDGES:
        factor = torch.linalg.cholesky(squares + ridge * torch.eye(len(squares)).to(squares))
        whole = torch.cholesky_solve(products, factor)  # of full rank
        most = min(rank, *whole.shape)
        # Its best approximation on these tokens, as they are beside the ridge: what it predicts, in so many directions.
        _, _, directions = torch.svd_lowrank(whole.T @ products, min(most + 8, whole.shape[1]), niter=6)
        b = directions[:, :most].T
        a = whole @ b.T / scale.unsqueeze(1)
        balance = a.norm(dim=0).sqrt().clamp(min=1e-12)
        a, b = a / balance, b * balance.unsqueeze(1)
        yield _as_expert(a, b, y_mean - x_mean @ a @ b, parts[0][1])


def _as_expert(a: Tensor, b: Tensor, bias: Tensor, like: Tensor) -> SharedExpert:
    """x a b + bias, in the dtype and on the device of `like`."""
    shared = SharedExpert(a.shape[0], 2 * a.shape[1], b.shape[1], like.device, like.dtype)
    for parameter, value in zip(
        shared.parameters(), (torch.cat([a, -a], 1).T, torch.cat([b, -b]), bias), strict=True
    ):
        parameter.data.copy_(value)
    return shared
