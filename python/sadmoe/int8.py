"""Experts in int8 and routers in bfloat16, a quarter and half of float32's bytes, for which few tokens mostly wait."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sadmoe.dial import converted_layers
from sadmoe.layer import ALL_SCALES, SCALES, DynamicKMoE
from sadmoe.modules import refuse_distributed
from sadmoe.tables import format_table
from sadmoe.undo import surgery
from sadmoe.weights import check_own_weights, check_parameters


@dataclass(frozen=True)
class Int8Report:
    """Bytes of the experts' weights, without routers, before and after, and by layer the relative error of all of them
    together: |rounded - original| / |original|, Euclidean norms, the down projection's columns over their scales."""

    bytes_before: int
    bytes_after: int
    errors: Mapping[str, float]

    def __str__(self) -> str:
        rows = [(name, f"{error:.2%}") for name, error in self.errors.items()]
        sizes = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB of experts"
        return f"{format_table(('layer', 'error of weights'), rows)}\n{sizes}"


def quantize_experts_(model: nn.Module) -> Int8Report:
    """Rounds the experts of a converted model to int8, in place, with a scale for each neuron in each matrix and for
    each column of the down projection, and routers in float32 to bfloat16; biases stay as they are, activations are
    rounded to 16 bits on the way.

    What few tokens take is mostly the reading of weights, so decoding gains most. On the CPU the ops multiply in whole
    numbers: dense torch at tau = 0 and the fast path of bf16 are not taken. On other devices weights are widened at
    every call, which is slow. The former weights are let go when all are rounded. Do it last: experts in int8 are not
    trained (`dequantize_experts_` first). It is saved with the model, not in adapters. A `restore_`d FFN keeps the
    rounding. Raises ValueError where nothing is converted, all experts are int8 already, or weights are pruned or
    parametrized. Whatever is raised, the model is as it was.
    """
    layers = _layers(model, int8=False, why="are int8 already")
    before, errors = _bytes(layers), {}
    with surgery(model), torch.no_grad():
        for name, layer in layers.items():
            old = {key: w for key in SCALES if (w := getattr(layer, key)) is not None}
            layer.to_int8_()
            errors[name] = _error(layer, old)
    return Int8Report(before, _bytes(layers), errors)


def dequantize_experts_(model: nn.Module) -> None:
    """Widens the experts of `quantize_experts_` again, in place, to the dtype that they had, to be trained as before,
    and their routers; the rounding stays. Raises ValueError where nothing is converted, or no experts are int8.
    Whatever is raised, the model is as it was."""
    layers = _layers(model, int8=True, why="are not int8, see quantize_experts_")
    with surgery(model):
        for layer in layers.values():
            layer.to_float_()


def _layers(model: nn.Module, int8: bool, why: str) -> dict[str, DynamicKMoE]:
    """Those layers that are, or are not, int8: others were done before."""
    refuse_distributed(model)
    layers = converted_layers(model)
    check_own_weights(model, layers)
    check_parameters(layers)
    found = {name: layer for name, layer in layers.items() if layer.is_int8 is int8}
    if not found:
        raise ValueError(f"the experts of {next(iter(layers))} {why}")
    return found


def _error(layer: DynamicKMoE, old: Mapping[str, torch.Tensor]) -> float:
    wrong = size = 0.0
    for key, weight in old.items():
        columns = layer.scale_out.float() if key == "w_down" and layer.scale_out is not None else 1.0
        rounded, original = layer.float_weights(key).float(), weight.float()
        wrong += ((rounded - original) / columns).square().sum().item()
        size += (original / columns).square().sum().item()
    return (wrong / size) ** 0.5 if size else 0.0


def _bytes(layers: Mapping[str, DynamicKMoE]) -> int:
    weights = (getattr(layer, key) for layer in layers.values() for key in (*SCALES, *ALL_SCALES))
    return sum(weight.nbytes for weight in weights if weight is not None)
