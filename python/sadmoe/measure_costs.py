"""Measures what a layer's sparse op costs beside its dense path, and keeps it: `sadmoe bench --calibrate`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe import measured, ops, paths
from sadmoe.dial import converted_layers
from sadmoe.layer import DynamicKMoE
from sadmoe.measured import Costs, Curve
from sadmoe.outputs import check_writable
from sadmoe.tables import format_table
from sadmoe.timing import measure, waiting

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)  # measured T; other calls go by the nearest
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # measured executed shares
PATIENCE = 20  # times the seconds of a variant, after which it has had its calls: some take seconds each
UNCACHED = 2**25  # floats, more than most caches hold: read before each call on a CPU


def calibrate_costs(
    model: nn.Module,
    path: Path,
    *,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 0.2,
    force: bool = False,
    progress: bool = False,
) -> list[Costs]:
    """Measures one layer of each shape and device of a converted model, adds each to the file, and returns them.

    What the file holds of other shapes and devices stays. Without force, shapes that it holds are left out; with it
    they are measured again, and a damaged file is replaced. This process reads the user's file again.
    Raises FileExistsError where there is nothing to measure, ValueError where the file is damaged or all experts are
    int8 or packed: those have no dense path.
    """
    layers = converted_layers(model).values()
    by_key = {key_of(layer): layer for layer in layers if not (layer.is_int8 or layer.is_packed)}
    if not by_key:
        raise ValueError(
            "the experts of this model are int8 or packed and always run by the op: there is nothing to calibrate"
        )
    known = _read(path, force)
    todo = [layer for key, layer in by_key.items() if force or key not in known]
    if not todo:
        raise FileExistsError(
            f"{path} holds this model's shapes on this device already: measure them again with --force"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path.parent, path)
    found = []
    for layer in tqdm(todo, "shapes", disable=not progress):
        costs = measure_costs(layer, tokens, seconds=seconds)
        known = _read(path, force)  # again: another process may have written meanwhile
        measured.write(path, (known | {costs.key: costs}).values())
        paths.use_costs(None)
        found.append(costs)
    return found


def measure_costs(
    layer: DynamicKMoE,
    tokens: Sequence[int] = TOKENS,
    shares: Sequence[float] = SHARES,
    seconds: float = 0.2,
) -> Costs:
    """What the sparse op costs beside the dense path in this layer, with its weights, on random tokens and masks.

    On a CPU 128 MiB are read between calls, so that weights have left most caches, as in a model, where other layers
    run in between: torch's products then wait for them longer than the op does. Masks are independent of the router,
    so that they have the share; every token runs an expert. seconds: for each variant at each T, at most PATIENCE times
    as long where few calls take longer. Raises ValueError where a number of tokens is below 1.
    """
    if min(tokens) < 1:
        raise ValueError(f"tokens must be at least 1 in every measured call, got {min(tokens)}")
    with torch.inference_mode():
        found = {T: _costs(layer, T, shares, seconds) for T in tokens}
    curves = {T: curve for T, (curve, _) in found.items()}
    every_expert = {T: cost for T, (_, cost) in found.items()}
    return Costs(*key_of(layer), torch.get_num_threads(), curves, every_expert)


def costs_table(costs: Costs) -> str:
    """The costs of a layer as people read them, and up to which executed share the op is taken."""
    lines = [
        [str(T), *(f"{cost:.2f} at {share:.0%}" for share, cost in curve)]
        for T, curve in costs.curves.items()
    ]
    width = max(map(len, lines))
    for T, line in zip(costs.curves, lines, strict=True):
        every = costs.every_expert.get(T)
        line += [""] * (width - len(line))
        line += [f"{costs.sparse_until(T):.0%}", "" if every is None else f"{every:.2f}"]
    return format_table(("tokens", *["cost"] * (width - 1), "sparse until", "at tau 0"), lines)


def _costs(layer: DynamicKMoE, T: int, shares: Sequence[float], seconds: float) -> tuple[Curve, float]:
    """The curve at T tokens, and the cost at tau = 0."""
    g = torch.Generator().manual_seed(T)
    device, dtype = layer.w_up.device, layer.w_up.dtype
    x = torch.randn(T, layer.shape.d, generator=g, device="cpu").to(device, dtype)
    masks: dict[float, Tensor] = {}
    for share in shares:
        mask = torch.rand(T, layer.experts, generator=g, device="cpu") < share
        one = torch.randint(layer.experts, (T,), generator=g, device="cpu")
        mask[torch.arange(T, device="cpu"), one] = True
        masks[mask.float().mean().item()] = mask.to(device)

    def routed(way: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> None:
        ops.dynamic_k_select(layer.router(x), 0.5)
        way(x, mask)

    def sparse(x: Tensor, mask: Tensor) -> Tensor:
        return ops.sparse_experts(x, mask, *layer.expert_weights(), act=layer.act)

    variants: dict[str, Callable[[], object]] = {
        str(share): partial(routed, sparse, mask) for share, mask in masks.items()
    }
    variants["masked"] = partial(routed, layer.masked_dense, masks[min(masks)])
    variants["op at tau 0"], variants["dense at tau 0"] = partial(layer.op_on_all, x), partial(layer.dense, x)
    calls = {name: waiting(call, device) for name, call in variants.items()}
    others = torch.ones(UNCACHED if device.type == "cpu" else 0, dtype=torch.float32, device="cpu")
    timings = measure(calls, seconds, patience=PATIENCE * seconds, before=lambda _: others.sum())
    times = {name: timing.median for name, timing in timings.items()}
    curve = tuple((share, times[str(share)] / times["masked"]) for share in sorted(masks))
    return curve, times["op at tau 0"] / times["dense at tau 0"]


def key_of(layer: DynamicKMoE) -> measured.Key:
    """What the costs of the layer are looked up by."""
    return paths.device_name(layer.w_up.device), paths.dtype_name(layer.w_up.dtype), layer.shape


def _read(path: Path, force: bool) -> dict[measured.Key, Costs]:
    try:
        return measured.read(path)
    except ValueError:
        if not force:
            raise
        return {}
