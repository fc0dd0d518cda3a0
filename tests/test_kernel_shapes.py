"""The kernels on awkward shapes: within the tolerance rule, and the same bits in every run and schedule."""

import itertools
from typing import NamedTuple

import pytest
import torch
from backends import OPS
from problems import (
    assert_as_good_as_torch,
    assert_scores_as_good_as_torch,
    experts_problem,
    in_double,
    router_problem,
)
from sadmoe import reference


class Shape(NamedTuple):
    """`chosen`: a tenth of the pairs at random; few experts by all and the others by none; one hot expert; or all."""

    T: int
    s: int
    E: int
    d: int
    chosen: str
    dtype: torch.dtype
    gated: bool


VALUES = Shape(
    (0, 1, 31, 33, 1000),
    (8, 24, 32, 88, 128),
    (1, 7, 128, 512),
    (64, 576, 768, 2048),
    ("some", "few", "hot", "all"),
    (torch.float32, torch.bfloat16, torch.float16),
    (False, True),
)
F32, BF16, F16 = VALUES.dtype
SHAPES = [  # every two values of different columns meet in some line, at little cost to the emulator
    Shape(*line)
    for line in (
        (0, 8, 128, 64, "hot", F16, True),
        (0, 8, 512, 576, "few", BF16, False),
        (0, 8, 512, 768, "few", F32, False),
        (0, 8, 512, 2048, "few", BF16, True),
        (0, 24, 1, 576, "all", F32, False),
        (0, 32, 128, 64, "all", BF16, False),
        (0, 88, 7, 64, "all", BF16, False),
        (0, 128, 1, 2048, "all", BF16, False),
        (0, 128, 7, 576, "some", BF16, True),
        (1, 8, 128, 768, "some", BF16, False),
        (1, 8, 512, 64, "some", F16, False),
        (1, 24, 7, 2048, "some", F32, False),
        (1, 24, 512, 64, "all", F16, False),
        (1, 32, 1, 768, "all", F16, True),
        (1, 88, 1, 576, "all", BF16, False),
        (1, 88, 1, 2048, "some", F16, False),
        (1, 88, 128, 64, "few", BF16, False),
        (1, 128, 1, 64, "hot", F32, True),
        (31, 8, 128, 2048, "few", F16, False),
        (31, 24, 1, 64, "all", F16, False),
        (31, 24, 7, 768, "hot", BF16, False),
        (31, 32, 1, 576, "hot", BF16, False),
        (31, 32, 7, 64, "few", F16, False),
        (31, 88, 1, 64, "some", F32, True),
        (31, 128, 128, 64, "few", F32, False),
        (31, 128, 512, 64, "few", F32, False),
        (33, 8, 7, 64, "some", F32, False),
        (33, 8, 128, 576, "few", F16, False),
        (33, 24, 1, 64, "few", BF16, True),
        (33, 32, 7, 2048, "hot", F16, False),
        (33, 88, 1, 768, "some", F16, False),
        (33, 88, 512, 64, "hot", F16, False),
        (33, 128, 1, 64, "all", F16, True),
        (1000, 8, 1, 64, "all", BF16, True),
        (1000, 24, 1, 576, "some", BF16, True),
        (1000, 24, 1, 2048, "some", F16, False),
        (1000, 24, 128, 64, "hot", BF16, False),
        (1000, 32, 1, 64, "some", F32, False),
        (1000, 32, 512, 64, "few", BF16, False),
        (1000, 88, 7, 64, "some", BF16, False),
        (1000, 128, 1, 768, "some", BF16, False),
    )
]
HEAVY = 1 << 21  # elements of a weight that take their time
EMULATED = 1 << 22  # products of a matrix that the emulator takes seconds for


def mask_of(shape):
    T, _, E, *_ = shape
    if shape.chosen == "all":
        return torch.ones(T, E, dtype=torch.bool)
    mask = torch.zeros(T, E, dtype=torch.bool)
    if shape.chosen == "some":
        return torch.rand(T, E, generator=torch.Generator().manual_seed(2)) < 0.1
    if shape.chosen == "few":
        mask[:, [0, E - 1]] = True
        return mask
    mask[:, E // 2] = True
    mask[: T // 2 : 7, : E // 3 : 11] = True
    return mask


def tau_of(shape):
    """For some of the experts; where many tokens choose among many, for one or two each: the emulator is slow."""
    return 0.95 if shape.T > 1 and shape.E > 7 else 0.5


def test_every_two_values_meet():
    for a, b in itertools.combinations(Shape._fields, 2):
        wanted = set(itertools.product(getattr(VALUES, a), getattr(VALUES, b)))
        assert {(getattr(shape, a), getattr(shape, b)) for shape in SHAPES} == wanted, (a, b)


def id_of(shape):
    return "-".join(str(value).removeprefix("torch.") for value in shape)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape,
            id=id_of(shape),
            marks=[pytest.mark.slow] if shape.T == 1000 or shape.E * shape.s * shape.d >= HEAVY else [],
        )
        for shape in SHAPES
    ],
)
def test_awkward_shapes(backend, shape):
    args = experts_problem(shape.T, shape.d, shape.E, shape.s, gated=shape.gated, dtype=shape.dtype)
    args[1] = mask_of(shape)
    x, _, *weights = args
    router = router_problem(shape.d, shape.E, r=16, dtype=shape.dtype)
    act, tau = "silu" if shape.gated else "gelu", tau_of(shape)

    def stages():
        scores = backend.router_scores(x, *router)
        return scores, backend.dynamic_k_select(scores, tau), backend.sparse_experts(*args, act=act)

    backend.use_hopper(False)
    found = scores, chosen, y = stages()
    assert_scores_as_good_as_torch(scores, x, *router)
    assert torch.equal(chosen, reference.dynamic_k_select(scores, tau))
    assert_as_good_as_torch(
        y,
        reference.sparse_experts(*args, act=act),
        reference.sparse_experts(*in_double(args), act=act),
    )
    backend.reschedule((2, 3, 0))
    for op, again, first in zip(OPS[:3], stages(), found, strict=True):
        assert torch.equal(again, first), op
    pairs = shape.T * min(shape.E, 2)  # or fewer: one or two experts a token
    cheap = backend.is_cpu or pairs * shape.s * shape.d < EMULATED
    some = slice(None) if cheap else slice(130)
    staged = backend.sparse_experts(x[some], chosen[some], *weights, act=act)
    assert torch.equal(backend.dynamic_k_moe(x[some], *router, *weights, tau=tau, act=act), staged)
    if shape.dtype != torch.float32 and not backend.is_cpu:
        backend.use_hopper(True)
        backend.reschedule((1, 5, 1))
        assert torch.equal(backend.router_scores(x, *router), scores)
        assert torch.equal(backend.sparse_experts(*args, act=act), y)
