"""A peer of our own in Triton, in the manner of the field: expert by expert, rows gathered, sums by atomics.

The lists of rows are given, so it pays for no index; sums are float32, so their order changes from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _up(
    x, w_up, w_gate, h, rows, starts, d, s,
    GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    start, end = tl.load(starts + e), tl.load(starts + e + 1)
    r = start + tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.program_id(2) * BN + tl.arange(0, BN)
    if start + tl.program_id(1) * BM < end:
        t = tl.load(rows + r, mask=r < end, other=0)
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        gates = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, d, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(
                x + t[:, None] * d + k[None, :], mask=(r < end)[:, None] & (k < d)[None, :], other=0.0
            )
            at = (e * s + j)[None, :] * d + k[:, None]
            there = (j < s)[None, :] & (k < d)[:, None]
            sums = tl.dot(a, tl.load(w_up + at, mask=there, other=0.0), sums)
            if GATED:
                gates = tl.dot(a, tl.load(w_gate + at, mask=there, other=0.0), gates)
        value = gates * tl.sigmoid(gates) * sums if GATED else tl.maximum(sums, 0.0)
        tl.store(
            h + r[:, None] * s + j[None, :],
            value.to(h.dtype.element_ty),
            mask=(r < end)[:, None] & (j < s)[None, :],
        )


@triton.jit
def _down(
    h, w_down, y, rows, starts, s, d_out, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    e = tl.program_id(0)
    start, end = tl.load(starts + e), tl.load(starts + e + 1)
    r = start + tl.program_id(1) * BM + tl.arange(0, BM)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    if start + tl.program_id(1) * BM < end:
        t = tl.load(rows + r, mask=r < end, other=0)
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        for j0 in range(0, s, BK):
            j = j0 + tl.arange(0, BK)
            a = tl.load(
                h + r[:, None] * s + j[None, :], mask=(r < end)[:, None] & (j < s)[None, :], other=0.0
            )
            b = tl.load(
                w_down + (e * s + j)[:, None] * d_out + c[None, :],
                mask=(j < s)[:, None] & (c < d_out)[None, :],
                other=0.0,
            )
            sums = tl.dot(a, b, sums)
        there = (r < end)[:, None] & (c < d_out)[None, :]
        tl.atomic_add(y + t[:, None] * d_out + c[None, :], sums, mask=there)


def experts(
    x: Tensor, rows: Tensor, starts: Tensor, most: int, w_up: Tensor, w_gate: Tensor | None, w_down: Tensor
) -> Tensor:
    """rows int32 [pairs], by expert; starts int32 [E + 1]; most: pairs of the busiest expert. ReLU, or a SiLU GLU."""
    E, s, d = w_up.shape
    d_out = w_down.shape[2]
    h = torch.empty(rows.numel(), s, device=x.device, dtype=x.dtype)
    y = torch.zeros(x.shape[0], d_out, device=x.device)
    block = min(128, max(16, triton.next_power_of_2(most)))
    columns = min(128, max(16, triton.next_power_of_2(s)))
    tiles = triton.cdiv(most, block)
    gate = w_up if w_gate is None else w_gate
    _up[(E, tiles, triton.cdiv(s, columns))](
        x, w_up, gate, h, rows, starts, d, s, GATED=w_gate is not None, BM=block, BN=columns, BK=32
    )
    _down[(E, tiles, triton.cdiv(d_out, 128))](
        h, w_down, y, rows, starts, s, d_out, BM=block, BN=128, BK=min(64, columns)
    )
    return y.to(x.dtype)
