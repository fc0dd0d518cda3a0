"""How active the neurons of an FFN are: the penalty that makes them fewer, and the measure (arXiv
2310.04361, 3.1)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm

from sadmoe import reference
from sadmoe.batches import NOTHING_AGAIN, Batch, Batches, check_batches, length, run, to_device
from sadmoe.checks import check_choice
from sadmoe.ffn import FFNSite, find_ffns
from sadmoe.forward import no_gradient
from sadmoe.hooks import LatestCall, hooks_on, uncompiled
from sadmoe.modules import device_of, evaluating, refuse_compiled
from sadmoe.padding import mask_rows, ran, real_rows, refuse_mask, rows_of
from sadmoe.passes import Noted, PassesLoss
from sadmoe.training.objective import Loss

Penalty = Literal["hoyer", "l1"]
FLOOR = 3e-8  # activations below it fade to none: root of the 1e-15 that the paper's code adds to sum a^2
FURTHER = 64  # of the training batches, to find such as run every FFN
SMALL = 0.01  # share of a token's largest |activation| below which a neuron counts as small


def square_hoyer(a: Tensor) -> Tensor:
    """(sum |a|)^2 / sum a^2 over the last dimension: how many neurons are effectively active.

    a [..., n] -> [...], float32, differentiable once. m equal entries give m, so it lies in [1, n]; the scale of
    `a` does not matter. The zero vector gives 0, with gradient 0. Source: Kurtz et al., ICML 2020, section
    2.1.
    """
    return _SquareHoyer.apply(a)


class _SquareHoyer(torch.autograd.Function):
    """By hand, for it is a large part of a training step: plain autograd makes eight copies of `a` in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        a = a.float() if a.dtype == torch.float64 else a  # norms are never narrowed
        sums, roots = (
            torch.linalg.vector_norm(a, p, dim=-1, keepdim=True, dtype=torch.float32) for p in (1, 2)
        )
        ctx.save_for_backward(a, sums, roots)
        return (sums / roots.clamp(min=FLOOR)).square().squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        a, sums, roots = ctx.saved_tensors
        squares = roots.clamp(min=FLOOR).square()
        of_sum = 2 * grad.unsqueeze(-1) * sums / squares
        # Below the floor the divisor is constant.
        of_entry = (-of_sum * sums / squares).masked_fill(roots < FLOOR, 0)
        # Rounded at the end alone: near sum a^2 / sum |a| the two cancel.
        return (a.sign() * of_sum).addcmul_(a, of_entry).to(a.dtype)


def l1(a: Tensor) -> Tensor:
    """sum |a| over the last dimension, in float32: [..., n] -> [...]."""
    return a.float().abs().sum(-1)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": square_hoyer, "l1": l1}


class SparsityLoss(PassesLoss):
    """The sparsity term of a training loss, taken from the forward pass of the user's own loop.

        with SparsityLoss(model) as sparsity:
            for batch in batches:
                loss = task_loss(model(**batch)) + alpha * sparsity(batch)

    Calling it gives the mean over FFNs and tokens of the penalty divided by f: with "hoyer", 1 means that
    every neuron is active, whatever the width. It then forgets the pass. The paper's code does not divide, so its alpha
    is ours / f, and averages FFNs and MLPs in the place of projections apart; here all weigh alike. The penalty acts on
    relu(z) of the pre-activation z where the FFN has a ReLU or its square, else on max(z - displacement, 0), which
    pushes z to where GELU and SiLU are nearly 0; in a GLU z is the gate's. It is computed in float32, also under
    autocast. Works with gradient checkpointing that is not reentrant. Source: arXiv 2310.04361, section 3.1.

    sites: the FFNs that are penalised, from `find_ffns`; all of the model's if None. Raises ValueError where there are
    none, the penalty is unknown, or the model is compiled.
    """

    _called = "sparsity"

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[FFNSite] | None = None,
        *,
        penalty: Penalty = "hoyer",
        displacement: float = -10.0,
    ):
        refuse_compiled(model)
        check_choice("penalty", penalty, PENALTIES)
        super().__init__(model)
        self.sites = find_ffns(model) if sites is None else _some(sites)
        self.penalty = penalty
        self.displacement = displacement

    def _watching(self) -> AbstractContextManager[Any]:
        return hooks_on(site.first.register_forward_hook(partial(self._record, site)) for site in self.sites)

    def __call__(self, batch: Batch | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The penalty of the passes since the last call: a scalar, float32, in the autograd graph of those
        passes.

        batch: what the model was called with, whose "attention_mask", if it has one, says which tokens are real (in an
        encoder-decoder also "decoder_attention_mask").   mask: the same by itself, bool or 0/1 [B, T], nonzero where a
        token is real. Without either every position counts, as in the paper's code.
        Raises RuntimeError where no pass came before or it left no gradient, ValueError where the mask does
        not fit.
        """
        refuse_mask(batch, "mask")
        seen = self._taken()
        self._check_gradient(seen)
        device = device_of(self.model)  # of one that lies on several, the first
        means = [
            torch.stack([self._mean(site, noted, batch, mask) for noted in seen[site.name]]).mean().to(device)
            for site in self.sites
            if site.name in seen
        ]
        return torch.stack(means).mean()

    def _record(self, site: FFNSite, module: nn.Module, args: Any, output: Tensor) -> None:
        z = site.pre_activation(output)
        a = z.relu() if site.act in reference.RECTIFIERS else (z.float() - self.displacement).clamp(min=0)
        self._note(site.name, PENALTIES[self.penalty](a) / z.shape[-1])

    def _check_gradient(self, seen: Mapping[str, list[Noted]]) -> None:
        if not torch.is_grad_enabled():
            return
        for site in self.sites:
            values = [noted.value for noted in seen.get(site.name, [])]
            trained = any(p.requires_grad for p in site.first.parameters())
            if values and trained and not any(value.requires_grad for value in values):
                raise no_gradient(f"for the penalty of {site.name}")

    def _mean(self, site: FFNSite, noted: Noted, batch: Batch | None, mask: Tensor | None) -> Tensor:
        values = noted.value
        if mask is None:
            real = real_rows(self.model, site.name, ran(batch, noted.given), values.unsqueeze(-1))
            if real is None:  # of no rows 0, not NaN
                return values.mean() if values.numel() else values.sum()
            return _masked_mean(values, real)
        if mask.numel() != values.numel():
            raise ValueError(
                f"mask must have one entry for each of the {values.numel()} tokens {tuple(values.shape)} "
                f"that {site.name} saw, got {tuple(mask.shape)}; where layers see different tokens, "
                "pass the batch instead"
            )
        return _masked_mean(values, mask_rows(mask, values.unsqueeze(-1).shape))


def _some(sites: Sequence[FFNSite]) -> list[FFNSite]:
    if not sites:
        raise ValueError("sites must hold at least one FFN, got none: pass find_ffns(model), or leave it out")
    return list(sites)


def _masked_mean(values: Tensor, real: Tensor) -> Tensor:
    """The mean of values [...] of those rows."""
    weights = real.to(values.device).bool()
    return (values.flatten() * weights).sum() / weights.sum().clamp(min=1)


@dataclass(frozen=True)
class LayerSparsity:
    """Of all (token, neuron) pairs of one FFN: the share whose activation is exactly 0, and the share below
    1 % of the token's largest. In a GLU the activation is the gate's."""

    name: str
    f: int
    zero: float
    small: float


def measure_sparsity(
    model: nn.Module,
    batches: Batches,
    sites: Sequence[FFNSite] | None = None,
    *,
    loss: Loss | None = None,
    progress: bool = False,
) -> list[LayerSparsity]:
    """The sparsity of every FFN over `batches`, in the order of the sites, padding left out; in eval mode, the model is
    left as it was.

    It reads what the activation gives out, so it is right for GELU and SiLU too, which are hardly ever
    exactly 0.
    sites: from `find_ffns`; all of the model's if None.   loss: runs the model in the place of a plain call, as in
    `sparsify_`, where a batch holds more than the model takes. Raises ValueError where there is no site, or an FFN is
    never run.
    """
    check_batches(batches)
    sites = find_ffns(model, batches=batches) if sites is None else _some(sites)
    return _of_counts(sites, _count(model, batches, sites, loss, progress))


def measure_first(
    model: nn.Module, batches: Batches, sites: Sequence[FFNSite], loss: Loss | None, least: int
) -> tuple[list[LayerSparsity], list[Batch]]:
    """`measure_sparsity` over the first so many batches, and over such of the next ones, FURTHER times as many at most,
    as run an FFN that had not run; these batches are given back."""
    taken: list[Batch] = []
    counts = {site.name: torch.zeros(3, dtype=torch.float64, device="cpu") for site in sites}
    stream = iter(batches)
    for _ in range(1 + FURTHER):
        some = list(islice(stream, least))
        if taken and not some:
            break
        found = _count(model, some, sites, loss, False)
        if not taken or any(found[name][0] and not pairs for name, (pairs, *_) in counts.items()):
            taken += some
            counts = {name: count + found[name] for name, count in counts.items()}
        if all(pairs for pairs, *_ in counts.values()):
            break
    return _of_counts(sites, counts), taken


def _count(
    model: nn.Module, batches: Batches, sites: Sequence[FFNSite], loss: Loss | None, progress: bool
) -> dict[str, Tensor]:
    """Of each site [3]: pairs of a token and a neuron, of these zero ones and small ones."""
    counts = {site.name: torch.zeros(3, dtype=torch.float64, device="cpu") for site in sites}
    current: dict[str, Any] = {}

    def count(site: FFNSite, module: nn.Module, args: Any, output: Tensor) -> None:
        real = real_rows(model, site.name, ran(current["batch"], call.given), output)
        a = reference.ACTIVATIONS[site.act](site.pre_activation(rows_of(output))).abs()
        a = a if real is None else a[real]
        if a.numel():
            small = (a < SMALL * a.amax(-1, keepdim=True)) | (a == 0)
            counts[site.name] += torch.tensor(
                [a.numel(), int((a == 0).sum()), int(small.sum())], device="cpu"
            )

    hooks = (site.first.register_forward_hook(partial(count, site)) for site in sites)
    with uncompiled(), LatestCall(model) as call, hooks_on(hooks), evaluating(model):
        for batch in tqdm(batches, "activations", length(batches), disable=not progress):
            current["batch"] = to_device(batch, device_of(model))
            (run if loss is None else loss)(model, current["batch"])
    if not current:
        raise ValueError(NOTHING_AGAIN)
    return counts


def _of_counts(sites: Sequence[FFNSite], counts: Mapping[str, Tensor]) -> list[LayerSparsity]:
    if missed := [name for name, (pairs, *_) in counts.items() if pairs == 0]:
        raise ValueError(
            f"the batches never reach {', '.join(missed)}: pass batches that run every FFN, or leave out those "
            "that they never run, by a filter (--only)"
        )
    return [
        LayerSparsity(site.name, site.dense().f, float(zero / pairs), float(small / pairs))
        for site in sites
        for pairs, zero, small in [counts[site.name]]
    ]
