"""Balanced k-means: which neurons of an FFN make an expert together.

The rows of the input weights are scaled to length one (arXiv 2310.04361, section 3; MoEfication,
arXiv 2110.01786) and rounded to a grid of 2**-25, as integers held in float64. Every sum of products of them
is then exact, in whatever order a BLAS with however many threads takes it, so the labels depend on the
weights and the seed and on nothing else.
"""

import logging
import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

try:
    from sadmoe._partition import assign
except ImportError as error:
    raise ImportError(
        f"sadmoe's compiled partition solver does not load: {error}. Build it for this Python: `pip install "
        ".` in the source tree, and import sadmoe from outside it; or `pip install -e .` to work inside it."
    ) from error

__all__ = ["inertia", "partition", "slots"]

logger = logging.getLogger(__name__)

# Of entries, and of squared distances: products stay below 2**53, costs below the solver's limit.
_GRID = 2.0**25
_CHUNK = 2**22  # costs that are computed together: 32 MiB
_TOLERANCE, _PATIENCE = 1e-4, 3  # stop where the best inertia gained less than this share, so often in a row


def partition(
    weights: Tensor,
    experts: int,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_iter: int = 30,
    progress: bool = False,
) -> Tensor:
    """Experts of the neurons: balanced k-means on L2-normalised rows, exactly f / experts neurons each.

    weights [f, d]: one neuron a row, the gate's rows for a GLU. Rows of zeros stay zero. Identical rows, dead
    neurons above all, fill whole experts first. Then starts from random distinct rows (where sizes are fixed,
    k-means++ was measured to end no better), assigns exactly, and keeps the labels of least inertia over all
    steps of all `restarts`, of at most `max_iter` steps each.
    Returns int64 [f] on the device of `weights`, experts numbered by their first neuron. Computed on the CPU.

    The same weights and seed give the same labels, on any number of threads. The scale of a neuron does not
    matter (to the bit where it changes by a power of two, else but for rounding), nor does the order of the
    neurons, except which of several identical rows goes where.
    Raises TypeError, ValueError for weights that are no finite floating-point matrix, for `experts` that do
    not divide f (the message names the nearest that do), and for counts below 1.
    """
    _check(weights, experts, restarts, max_iter)
    f, s = len(weights), len(weights) // experts
    rows = _normalised(weights)
    order = _canonical_order(rows)
    grouped = _in_groups(rows[order], s)
    order = torch.cat([order[grouped], order[~grouped]])
    labels = torch.arange(f, device="cpu") // s  # of the rows in `order`: right for the groups
    n = int(grouped.sum())
    if n < f:
        generator = torch.Generator().manual_seed(seed)
        rest, free = rows[order[n:]], experts - n // s
        labels[n:] = n // s + _best_kmeans(rest, free, generator, restarts, max_iter, progress)
    return _numbered_by_first(torch.empty_like(labels).scatter_(0, order, labels), experts).to(weights.device)


def slots(labels: Tensor, experts: int) -> Tensor:
    """The neuron that each slot of the layer holds: experts ascending, neurons ascending inside an expert.

    labels int64 [f], each of 0 .. experts - 1 equally often -> int64 [f]. The experts' weights are
    `weights[slots(labels, E)].unflatten(0, (E, -1))`. Raises ValueError for any other labels.
    """
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"slots: labels must be int64 [f], got {labels.dtype} {list(labels.shape)}")
    if experts < 1 or len(labels) == 0 or labels.min() < 0 or labels.max() >= experts:
        found = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise ValueError(f"slots: labels must be numbers of {experts} experts, counted from 0, got {found}")
    counts = torch.bincount(labels, minlength=experts)
    if counts.min() != counts.max():
        raise ValueError(
            f"slots: every expert must have equally many neurons, got {counts.min()} to {counts.max()}"
        )
    return labels.argsort(stable=True)


def inertia(weights: Tensor, labels: Tensor) -> float:
    """What `partition` lowers: the squared distances of L2-normalised rows to their expert's mean, summed.

    weights [f, d], labels int64 [f], of experts of any sizes. From 0 (parallel rows in every expert) to f.
    """
    rows = F.normalize(weights.detach().double(), dim=1)
    counts = torch.bincount(labels)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, labels, rows)
    return float(rows.square().sum() - (sums.square().sum(1) / counts.clamp(min=1)).sum())


def _check(weights: Tensor, experts: int, restarts: int, max_iter: int) -> None:
    if weights.ndim != 2 or weights.numel() == 0:
        raise ValueError(f"partition: weights must be [f, d], one neuron a row, got {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"partition: weights must be floating-point, got {weights.dtype}")
    bad = (~weights.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"partition: weights must be finite, got NaN or inf in {len(bad)} rows, first {int(bad[0])}"
        )
    for name, count in (("experts", experts), ("restarts", restarts), ("max_iter", max_iter)):
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"partition: {name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"partition: {name} must be at least 1, got {count}")
    f = len(weights)
    if f % experts:
        divisors = [n for n in range(1, f + 1) if f % n == 0]
        below, above = [n for n in divisors if n < experts][-1:], [n for n in divisors if n > experts][:1]
        nearest = " and ".join(f"{n} (of {f // n})" for n in below + above)
        raise ValueError(
            f"partition: {f} neurons do not split into {experts} equal experts; nearest that do: {nearest}"
        )


def _normalised(weights: Tensor) -> Tensor:
    """Rows of length one in units of the grid: integers in float64 [f, d]."""
    rows = weights.detach().to("cpu", torch.float64, copy=True)
    for norm in (math.inf, 2):  # the largest entry first, so that no square overflows or vanishes
        length = torch.linalg.vector_norm(rows, norm, dim=1, keepdim=True)
        rows /= length.masked_fill_(length == 0, 1.0)
    return rows.mul_(_GRID).round_()


def _canonical_order(rows: Tensor) -> Tensor:
    """An order that does not depend on how the rows came: of their exact products with a fixed vector."""
    vector = torch.randint(
        -(2**18), 2**18, (rows.shape[1],), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    return (rows @ vector.double()).argsort(stable=True)


def _repeats(rows: Tensor) -> Tensor:
    """Which rows, in canonical order, are equal to the one before."""
    repeats = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    repeats[1:] = (rows[1:] == rows[:-1]).all(1)
    return repeats


def _in_groups(rows: Tensor, s: int) -> Tensor:
    """Which rows, in canonical order, fill experts with identical ones: s and s of those that are marked.

    Such experts add nothing to the inertia. In k-means, many equal rows are what the solver is slowest on: with
    30 % of 16384 rows zero and 4096 experts it had not ended after nine minutes, and so it takes eight seconds.
    """
    run = (~_repeats(rows)).cumsum(0) - 1
    lengths = torch.bincount(run)
    position = torch.arange(len(rows), device="cpu") - (lengths.cumsum(0) - lengths)[run]
    return position < (lengths // s * s)[run]


def _best_kmeans(
    rows: Tensor, experts: int, generator: torch.Generator, restarts: int, max_iter: int, progress: bool
) -> Tensor:
    best, labels = math.inf, torch.empty(0, device="cpu")
    with tqdm(total=restarts * max_iter, desc="partition", unit="step", disable=not progress) as bar:
        for restart in range(restarts):
            found, found_labels = _kmeans(rows, _start(rows, experts, generator), max_iter, bar)
            if found < best:
                best, labels = found, found_labels
            bar.update((restart + 1) * max_iter - bar.n)  # where it stopped before max_iter
    logger.debug("partition: %d neurons, %d experts, inertia %.6g", len(rows), experts, best / _GRID)
    return labels


def _start(rows: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Random rows as centres, none twice where enough differ."""
    shuffled = torch.randperm(len(rows), generator=generator, device="cpu")
    return rows[shuffled[_repeats(rows)[shuffled].argsort(stable=True)][:experts]]


def _kmeans(rows: Tensor, centres: Tensor, max_iter: int, bar: tqdm) -> tuple[float, Tensor]:
    """The least inertia met, in units of 1 / _GRID, and its labels."""
    squares = _squares(rows)
    s = len(rows) // len(centres)
    labels = torch.full((len(rows),), -1, device="cpu")
    prices = torch.zeros(len(centres), dtype=torch.int32, device="cpu")
    best, best_labels, stale = math.inf, labels, 0
    for step in range(max_iter):
        costs = _costs(rows, centres)
        if step > 0:
            _weigh_own(costs, labels, squares, s)
        before = labels
        labels, prices = map(torch.from_numpy, assign(costs.numpy(), labels.numpy(), prices.numpy()))
        centres = _means(rows, labels, len(centres))
        found = int(squares.sum() - s * _squares(centres).sum())
        stale = 0 if found < best * (1 - _TOLERANCE) else stale + 1
        if found < best:
            best, best_labels = found, labels
        bar.update()
        bar.set_postfix(inertia=f"{best / _GRID:.6g}", refresh=False)
        if stale == _PATIENCE or torch.equal(before, labels):
            break
    return best, best_labels


def _squares(rows: Tensor) -> Tensor:
    """Squared lengths of rows, int64 in units of 1 / _GRID."""
    return (rows.square().sum(1) / _GRID).round().long()


def _costs(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, less the squares of the rows: int32 [f, E] in units of 1 / _GRID."""
    costs = torch.empty(len(rows), len(centres), dtype=torch.int32, device="cpu")
    squares, minus_twice = centres.square().sum(1), (-2 * centres).T
    step = max(1, _CHUNK // len(centres))
    buffer = torch.empty(min(step, len(rows)), len(centres), dtype=torch.float64, device="cpu")
    for chunk, out in zip(rows.split(step), costs.split(step), strict=True):
        exact = torch.addmm(squares, chunk, minus_twice, out=buffer[: len(chunk)])
        out.copy_(exact.mul_(1 / _GRID).round_())
    return costs


def _weigh_own(costs: Tensor, labels: Tensor, squares: Tensor, s: int) -> None:
    """Takes a row's own pull on its centre out of its cost there, in place (Hartigan and Wong's rule).

    Leaving an expert of s rows lowers inertia by s / (s - 1) of the squared distance, joining one raises it
    by s / (s + 1). By plain distance a small expert never lets go of its rows: on the FFNs of MiniLM, inertia
    ended 1 to 5 % higher.
    """
    own = labels.unsqueeze(1)
    distances = costs.gather(1, own) + squares.unsqueeze(1)
    weighed = distances * (s + 1) // max(s - 1, 1)  # s = 1: every distance is 0
    costs.scatter_(1, own, (weighed - squares.unsqueeze(1)).int())


def _means(rows: Tensor, labels: Tensor, experts: int) -> Tensor:
    sums = rows.new_zeros(experts, rows.shape[1]).index_add_(0, labels, rows)
    return sums.div_(len(rows) // experts).round_()


def _numbered_by_first(labels: Tensor, experts: int) -> Tensor:
    first = torch.full((experts,), len(labels), device="cpu").scatter_reduce_(
        0, labels, torch.arange(len(labels), device="cpu"), "amin"
    )
    return first.argsort().argsort()[labels]
