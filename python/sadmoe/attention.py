"""Projections of attention as two-layer MLPs, which are then split, routed and gated like any FFN.

Only the linear maps change: scores, softmax, rotary positions and caches stay as they are, in whatever kernel.
Source: arXiv 2310.04361, section 3.4.
"""

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import Batches, check_batches, check_runs
from sadmoe.checks import Filter, check_choice, check_config, check_fields, check_filter, check_range
from sadmoe.ffn import (
    ATTENTION,
    ProjectionMLP,
    empty_mlp,
    find_ffns,
    projection_mlps,
    scan_ffns,
    stand_in,
    with_hooks,
)
from sadmoe.ffn.linears import bias_of, linear_shape, shape_of, weight_rows
from sadmoe.ffn.probe import Unsupported
from sadmoe.ffn.reads import what_else_is_read
from sadmoe.ffn.scan import Uses
from sadmoe.files import checksum
from sadmoe.forward import without_autocast
from sadmoe.inputs import CHUNK, held_out_and_batches, stream_inputs
from sadmoe.modules import check_model, plain_name, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.reference import ACTIVATIONS
from sadmoe.sparsify import SparsityLoss
from sadmoe.tables import format_table, shortened
from sadmoe.training import Checkpoint, LoopConfig
from sadmoe.training.loop import train
from sadmoe.training.processes import refuse_group
from sadmoe.training.resume import Kept, check_checkpoint
from sadmoe.undo import surgery

logger = logging.getLogger(__name__)
Start = Literal["low_rank", "random"]


@dataclass(frozen=True)
class ProjectionConfig:
    """How projections become MLPs: their width, and how each is trained on what its projection does.

    ratio: multiply-adds of the MLP over those of the projection.
    multiple: the width is rounded to a multiple of it, so that it splits into experts.
    act: the activation, "relu" or, for what is swapped later, another; "relu2" with start="random" alone.
    start: "low_rank", from the best linear map of half the width on the tokens at hand, each direction once for its
        positive and once for its negative part; or "random", torch's own, as in the paper. Eight projections of MiniLM,
        1000 steps, alpha 0.2: the first ended with a mean error of 0.032 and 33 % zeros, the second 0.042 and 16 %.
    steps: updates of each MLP.
    batch_tokens: tokens in each update, about.
    lr: AdamW's at the end of its warm-up, then down to 0.
    alpha: weight of the sparsity term per width (see `SparsityLoss`), rising linearly from 0.
    max_tokens: inputs of a projection to train on, of which a tenth is held out.
    max_bytes: of inputs held together; the batches are run again for projections beyond that.
    skip_padding: leave out inputs at padding tokens.
    filter: of a projection's name; False leaves it. None: all of them.
    seed: of the sample of inputs, the random start and the order of the tokens.
    """

    ratio: float = 1.0
    multiple: int = 8
    act: str = "relu"
    start: Start = "low_rank"
    steps: int = 1000
    batch_tokens: int = 512
    lr: float = 1e-3
    alpha: float = 0.05
    max_tokens: int = 16384
    max_bytes: int = 2**30
    skip_padding: bool = True
    filter: Filter | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("ProjectionConfig: act", self.act, ACTIVATIONS)
        if self.act == "relu2" and self.start == "low_rank":
            raise ValueError(
                "ProjectionConfig: act='relu2' is not linear for either sign, as start='low_rank' needs it: "
                "take start='random', or another act"
            )
        check_range(self, "ratio", "lr", above=0)
        check_range(self, "multiple", "steps", "batch_tokens", "max_bytes", least=1)
        check_range(self, "max_tokens", least=2)  # to hold some out
        check_range(self, "alpha", least=0)

    def loop(self) -> LoopConfig:
        """The training of one MLP."""
        return LoopConfig(
            steps=self.steps,
            alpha=self.alpha,
            schedule="linear",
            lr=self.lr,
            weight_decay=0.0,
            seed=self.seed,
        )

    def width_of(self, d: int, d_out: int) -> int:
        """Neurons a of an MLP that costs `ratio` times a projection: a (d + d_out) = ratio d d_out, rounded."""
        exact = self.ratio * d * d_out / (d + d_out)
        return max(1, round(exact / self.multiple)) * self.multiple


@dataclass(frozen=True)
class ProjectionFit:
    """One projection and its MLP, on tokens that it was not trained on.

    error: |y - t|^2 / |t - mean t|^2, sums over tokens: 0 is the projection, 1 its mean. start_error: the same before
    training. zero: share of the MLP's activations that are exactly 0.
    """

    name: str
    d: int
    d_out: int
    width: int
    start_error: float
    error: float
    zero: float


@dataclass(frozen=True)
class ProjectionReport:
    """What `replace_projections_` did, a row for each projection. Prints as a table."""

    layers: tuple[ProjectionFit, ...]
    seconds: float

    def __str__(self) -> str:
        header = ("projection", "d", "d_out", "width", "error at start", "error", "exactly 0")
        rows = []
        for f in self.layers:
            sizes, errors = (f.d, f.d_out, f.width), (f.start_error, f.error)
            rows.append((f.name, *map(str, sizes), *(f"{error:.4f}" for error in errors), f"{f.zero:.1%}"))
        return f"{format_table(header, rows)}\n{len(self.layers)} projections in {self.seconds:.0f} s"


class Place(NamedTuple):
    """A projection: its path, and the linear layer."""

    name: str
    linear: nn.Module


def find_projections(
    model: nn.Module, filter: Filter | None = None, *, batches: Batches | None = None
) -> list[Place]:
    """The linear layers of attention, in the model's order: Q, K, V (or all in one) and O.

    Those are the plain linear layers below a module whose class is named an attention (BertSelfAttention), and no part
    of an FFN, or of an nn.Sequential of several, such as the one that learns Swin v2's bias of positions.
    filter: takes a projection's path, False leaves it alone. batches: what the model is called with, by which more FFNs
    are known, as in `find_ffns`, and what is read of a projection beside its output. What cannot be replaced is logged
    with the reason.
    Raises ValueError where there is none at all, NotImplementedError where none can be replaced.
    """
    found, refused = scan_projections(model, filter, batches=batches)
    listing = "\n".join(f"  {line}" for line in refused)
    if found:
        if refused:
            logger.warning("%d projections are not replaced:\n%s", len(refused), listing)
        return found
    if refused:
        raise NotImplementedError(f"no projection of this {type(model).__name__} can be replaced:\n{listing}")
    done = len(projection_mlps(model))
    raise ValueError(
        f"no projection of attention found in this {type(model).__name__}"
        + (f": {done} are MLPs already" if done else ", that is no linear layer below an attention module")
        + ("" if filter is None else ", or the filter refused all")
    )


def scan_projections(
    model: nn.Module, filter: Filter | None = None, *, batches: Batches | None = None
) -> tuple[list[Place], list[str]]:
    """`find_projections` without errors and warnings: the sites, and of each that is none a line with the reason."""
    check_model(model)
    check_filter(filter)
    if batches is not None:
        check_batches(batches)
    found, refused = [], []
    uses = Uses(model)
    for name, parent, linear in _linears_of_attention(model, batches):
        plain = plain_name(name)
        if filter is not None and not filter(plain):
            continue
        path, _, child = name.rpartition(".")
        try:
            if isinstance(parent, nn.MultiheadAttention):
                raise Unsupported("nn.MultiheadAttention reads its weights itself and never calls it")
            uses.check_linears(parent, path, [child])
            found.append(Place(plain, linear))
        except Unsupported as reason:
            refused.append(f"{plain}: {reason}")
    modules = {place.name: place.linear for place in found}
    reads = {} if batches is None else what_else_is_read(model, modules, batches)
    refused += [f"{name}: what is around it reads its {', '.join(names)}" for name, names in reads.items()]
    return [place for place in found if place.name not in reads], refused


def replace_projections_(
    model: nn.Module,
    batches: Batches,
    config: ProjectionConfig | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> ProjectionReport:
    """Replaces each projection of attention by a two-layer MLP of equal cost, in place.

    Every MLP is trained by itself, on what enters its projection in the original model and on what that makes of it:
    mean squared error over the variance of what is wanted, + alpha * square Hoyer of its activations / width. All are
    built beside the model and put in last: whatever fails, Ctrl-C included, leaves the model as it was. Then
    `find_ffns`, `sparsify_` and `convert_` take them for FFNs; `restore_` gives the original projections back, bit for
    bit, for which they are kept in memory beside the MLPs (not in files).

    batches: as in `convert_`.   checkpoint: where to resume from after a kill, see `Checkpoint`.
    Source: arXiv 2310.04361, section 3.4, whose MLPs start at random.
    Raises ValueError and TypeError for wrong input, NotImplementedError where no projection can be replaced,
    RuntimeError in a process group of several, FloatingPointError where a loss is not finite.
    """
    config = ProjectionConfig() if config is None else check_config(config, ProjectionConfig)
    check_checkpoint(checkpoint)
    check_batches(batches)
    refuse_group("replace_projections_")
    check_model(model)
    refuse_distributed(model)
    started = time.perf_counter()
    with seeded(model, config.seed):  # a DataLoader may draw a number
        places = find_projections(model, config.filter, batches=batches)
    linears = {place.name: place.linear for place in places}
    if hooks := with_hooks(model, linears.values()):
        warnings.warn(
            f"{', '.join(shortened(hooks, 5))}: their hooks will not run while MLPs are in their place; if they change "
            "what is computed, the MLPs do not learn it. Remove them, or leave these out by a filter",
            stacklevel=2,
        )
    stream = stream_inputs(
        model, linears, batches, max_tokens=config.max_tokens,
        max_bytes=config.max_bytes, seed=config.seed, skip_padding=config.skip_padding, skip_unreached=True,
        progress=progress,
    )  # fmt: skip
    built: dict[str, tuple[ProjectionMLP, ProjectionFit]] = {}
    about = {} if checkpoint is None else _what_makes_inputs(model, config)
    with seeded(model, config.seed):
        for name, rows in tqdm(stream, "projections", len(places), disable=not progress):
            with without_autocast(rows.device):
                built[name] = _distilled(linears[name], rows, config, Kept(checkpoint, name, about))
            logger.info("%s", built[name][1])
    never = [place.name for place in places if place.name not in built]
    told = f"{', '.join(shortened(never, 5))}: never called on these batches (a parent may read their weights itself)"
    if not built:
        raise NotImplementedError(f"no projection of this {type(model).__name__} can be replaced: {told}")
    if never:
        logger.warning("%d projections are not replaced: %s", len(never), told)
    with surgery(model), seeded(model, config.seed):
        for name, (mlp, _) in built.items():
            stand_in(model, name, mlp)
        check_runs(model, batches, "MLPs in the place of its projections", "ProjectionConfig")
    fits = tuple(built[place.name][1] for place in places if place.name in built)
    return ProjectionReport(fits, time.perf_counter() - started)


def _linears_of_attention(
    model: nn.Module, batches: Batches | None
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(path, parent, linear layer) of each linear layer below an attention, FFNs and MLPs in their place left out."""
    taken = {id(linear) for s in scan_ffns(model, batches=batches)[0] for linear in s.linears.values()}
    for module in model.modules():
        linears = [m for m in module.children() if linear_shape(m) is not None]
        if isinstance(module, nn.Sequential) and len(linears) > 1:
            taken |= {id(linear) for linear in linears}
    inside = [n for n, m in model.named_modules() if n and ATTENTION.search(type(m).__name__)]
    mlps = [n for n, m in model.named_modules() if isinstance(m, ProjectionMLP)]
    found: list[tuple[str, nn.Module, nn.Module]] = []
    for name, module in model.named_modules():
        below = any(name.startswith(f"{path}.") for path in inside)
        ours = any(name.startswith(f"{path}.") for path in mlps)
        part = bool(found) and name.startswith(f"{found[-1][0]}.")  # of a linear layer: an adapter's matrices
        if below and not ours and not part and linear_shape(module) is not None and id(module) not in taken:
            found.append((name, model.get_submodule(name.rpartition(".")[0]), module))
    return found


def _what_makes_inputs(model: nn.Module, config: ProjectionConfig) -> dict[str, Any]:
    """Of an MLP's training, beside its loop's settings and the batches."""
    fields = ("act", "start", "batch_tokens", "max_tokens", "skip_padding")
    return {
        **{field: getattr(config, field) for field in fields},
        "model": checksum(dict(model.state_dict())),
        "acts": {site.name: site.act for site in scan_ffns(model)[0]},
    }


def _distilled(
    linear: nn.Module, rows: Tensor, config: ProjectionConfig, kept: Kept
) -> tuple[ProjectionMLP, ProjectionFit]:
    """The MLP of one projection, trained in float32, in the dtype of the projection at the end."""
    shape = shape_of(linear)
    weight: Any = linear.weight
    width = config.width_of(*shape)
    rows = rows[torch.randperm(len(rows), device="cpu").to(rows.device)]
    with torch.no_grad():
        # By `forward`, past hooks, which are the caller's, and may count or change what they see.
        targets = torch.cat([linear.forward(part).float() for part in rows.split(CHUNK)])
    if not targets.isfinite().all():
        raise ValueError(f"{kept.name}: not every output is finite; look for NaN or inf in inputs or weights")
    test, batches = held_out_and_batches(
        kept.name, {"rows": rows.float(), "targets": targets}, config.batch_tokens
    )
    mlp = empty_mlp(linear, width, config.act).float()
    if config.start == "low_rank":
        start_low_rank_(mlp, linear, [batch["targets"] for batch in batches])
    spread = (targets - targets.mean(0)).square().sum(1).mean().clamp(min=torch.finfo(torch.float32).tiny)

    def error(batch: Any, index: int | None = None) -> Tensor:
        return (mlp(batch["rows"]) - batch["targets"]).square().sum(1).mean() / spread

    def judged() -> tuple[float, float]:
        with torch.no_grad():
            return error(test).item(), (mlp.act(mlp.up(test["rows"])) == 0).float().mean().item()

    before = judged()[0]
    sites = find_ffns(nn.ModuleDict({"mlp": mlp}))
    with SparsityLoss(mlp, sites) as sparsity, torch.enable_grad():
        train(mlp, batches, config.loop(), error, sparsity, progress=False, kept=kept)
    fit = ProjectionFit(kept.name, *shape, width, before, *judged())
    mlp.zero_grad(set_to_none=True)
    return mlp.to(weight.dtype).requires_grad_(weight.requires_grad), fit


@torch.no_grad()
def start_low_rank_(mlp: ProjectionMLP, linear: nn.Module, targets: Sequence[Tensor]) -> None:
    """Starts an MLP as y = U Uᵀ (W x + b), U the main directions of the targets [n, d_out], half as many as
    neurons. targets: in parts.

    An activation passes one sign, so a direction takes two neurons: z = act(z) - act(-z), which holds for all but the
    square of ReLU. Neurons left over start without output.
    """
    half = mlp.up.out_features // 2
    _, vectors = torch.linalg.eigh(sum(part.t() @ part for part in map(Tensor.double, targets)))
    first = max(vectors.shape[1] - half, 0)
    u = vectors[:, first:].flip(1).float()  # [d_out, half], or d_out where that is less
    k = u.shape[1]
    into, bias = u.t() @ weight_rows(linear).float(), bias_of(linear)
    mlp.up.weight[:k], mlp.up.weight[half : half + k] = into, -into
    mlp.down.weight.zero_()
    mlp.down.weight[:, :k], mlp.down.weight[:, half : half + k] = u, -u
    if bias is not None:
        mlp.up.bias[:k], mlp.up.bias[half : half + k] = u.t() @ bias.float(), -(u.t() @ bias.float())
        mlp.down.bias.zero_()
