"""Random problems for the ops, and what every kernel is held to: the tolerance rule, and a token's own bits."""

import itertools
from collections.abc import Callable

import torch
from sadmoe import reference
from torch import Tensor


def experts_problem(
    T: int = 7,
    d: int = 33,
    E: int = 5,
    s: int = 6,
    d_out: int | None = None,
    *,
    gated: bool = False,
    bias: bool = True,
    share: float = 0.4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor | None]:
    """x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, of unit variance through the layer."""
    g = torch.Generator().manual_seed(seed)
    d_out = d if d_out is None else d_out

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    return [
        normal(T, d),
        torch.rand(T, E, generator=g) < share,
        normal(E, s, d, scale=d**-0.5),
        normal(E, s, d_out, scale=(E * s) ** -0.5),
        normal(E, s) if bias else None,
        normal(E, s, d, scale=d**-0.5) if gated else None,
        normal(E, s) if gated and bias else None,
        normal(d_out) if bias else None,
    ]


def int8_problem(*, dtype: torch.dtype = torch.float32, without_columns: bool = False, **kw) -> list:
    """x, mask and the experts, as `sparse_experts_int8` takes them."""
    x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out = experts_problem(dtype=dtype, **kw)

    def rounded(weight):
        if weight is None:
            return None, None
        scale = (weight.float().abs().amax(-1) / 127).to(dtype)
        return (weight.float() / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale

    (w_up, scale_up), (w_down, scale_down), (w_gate, scale_gate) = map(rounded, (w_up, w_down, w_gate))
    scale_out = None if without_columns else torch.linspace(0.25, 1.5, w_down.shape[2]).to(dtype)
    return [x, mask, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out]


def router_problem(
    d: int, E: int, r: int = 9, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[Tensor]:
    """v1, v2."""
    g = torch.Generator().manual_seed(seed)
    v1, v2 = torch.randn(r, d, generator=g) * d**-0.5, torch.randn(E, r, generator=g) * r**-0.5
    return [v1.to(dtype), v2.to(dtype)]


def in_double(args: list[Tensor | None]) -> list[Tensor | None]:
    return [a if a is None or not a.is_floating_point() else a.double() for a in args]


def assert_as_good_as_torch(
    ours: Tensor, torchs: Tensor, truth: Tensor, terms: Tensor | None = None, rounding: float = 0.0
) -> None:
    """Our error against float64 is at most twice that of plain torch in the same dtype.

    Torch may be exact by luck on a small problem: four float32 roundings of the
    largest sum of `terms` (default: the result), and the last one to the dtype, are granted; and, where the
    contract rounds on the way, so much of the terms.
    """
    assert ours.dtype == torchs.dtype
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    size = truth.abs().max()
    granted = (4 * torch.finfo(torch.float32).eps + rounding) * (size if terms is None else terms.abs().max())
    granted += 0.51 * torch.finfo(ours.dtype).eps * size
    error, torch_error = (ours.double() - truth).abs().max(), (torchs.double() - truth).abs().max()
    allowed = max(2 * torch_error, granted)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, torch's own {torch_error:.3g}"


def assert_scores_as_good_as_torch(scores: Tensor, x: Tensor, v1: Tensor, v2: Tensor) -> None:
    hidden = torch.relu(x.double() @ v1.double().T)
    truth, terms = (hidden @ v2.double().T).abs(), hidden @ v2.double().T.abs()
    assert scores.dtype == torch.float32
    assert_as_good_as_torch(scores, reference.router_scores(x, v1, v2), truth, terms)


def assert_the_same_in_parts(run: Callable[[Tensor], Tensor], x: Tensor, whole: Tensor) -> None:
    """Of 600 tokens, some alone and on other threads have the bits that they have among all."""
    threads = torch.get_num_threads()
    try:
        for count, part in itertools.product((1, 2, 3), (slice(0, 1), slice(40, 73), slice(100, 600))):
            torch.set_num_threads(count)
            assert torch.equal(run(x[part]), whole[part]), (count, part)
    finally:
        torch.set_num_threads(threads)
