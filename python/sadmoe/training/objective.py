"""What a model is held to while it is trained: its task, or the dense model that it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sadmoe.batches import Batch, check_repeats, run, to_device
from sadmoe.checks import check_choice
from sadmoe.ffn import FFNSite
from sadmoe.ffn.lookup import is_module, join
from sadmoe.forward import is_recomputed, no_gradient
from sadmoe.hooks import hooks_on
from sadmoe.modules import device_of, floats_in, is_encoder_decoder, unwrapped
from sadmoe.padding import real_rows

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> scalar; it runs the model itself
LONGEST = 100.0  # times the median |h_dense|^2 of the tokens: a longer one counts as one of that
LEAST = 1e-6  # of their mean, which that is at least, where most tokens are all but 0
# Runs the model on a batch and says how far off it is. The index is the same whenever the same batch comes; None where
# that is not known.
Objective = Callable[[Batch, int | None], Tensor]
OutputLoss = Callable[[Any, Any, Any], Tensor]  # (model's output, dense model's output, batch) -> scalar


def check_output_loss(output_loss: OutputLoss | str | None) -> None:
    """Raises ValueError where it is a word that means nothing, TypeError where nothing can be called."""
    if isinstance(output_loss, str):
        check_choice("output_loss", output_loss, ("logits",))
    elif output_loss is not None and not callable(output_loss):
        raise TypeError(
            "output_loss must be output_loss(model's output, dense model's output, batch) -> scalar, \"logits\" or "
            f"None, got {output_loss!r}"
        )


def task(model: nn.Module, loss: Loss | None, instead: str = "teacher=") -> Objective:
    """loss(model, batch), or the `.loss` that the model puts into its output. instead: what trains without one."""

    def objective(batch: Batch, index: int | None = None) -> Tensor:
        value = loss(model, batch) if loss is not None else own_loss(run(model, batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"the task needs a scalar loss, got {_kind(value)}: put labels into the batches of a model that then "
                "returns .loss, or pass loss=lambda model, batch: ...; without labels, train towards the dense model "
                f"({instead})"
            )
        return value.squeeze()

    return objective


def distill_logits(model: nn.Module, dense: nn.Module, *, kept_bytes: int = 0) -> Objective:
    """What `logits_kl` gives, of the whole output. kept_bytes: see `distill_hidden`."""
    _check_teacher(model, dense, [])
    distance, kept, steady = logits_kl(model), Remembered(kept_bytes), _Steady()

    def dense_logits(batch: Batch) -> Tensor:
        with torch.no_grad(), padded():
            return _here(model, dense, _logits(run(dense, to_device(batch, device_of(dense)))))

    def objective(batch: Batch, index: int | None = None) -> Tensor:
        wanted = kept.get(index, lambda: dense_logits(batch))
        steady.check([wanted], lambda: [dense_logits(batch)])
        with padded():
            return distance(run(model, batch), wanted, batch)

    return objective


def logits_kl(model: nn.Module) -> OutputLoss:
    """KL(dense || model) of the logits at temperature 1, averaged over the real tokens (or samples)."""
    side = "decoder" if is_encoder_decoder(model) else ""

    def distance(output: Any, wanted: Any, batch: Batch) -> Tensor:
        logits, target = _logits(output), _logits(wanted)
        log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        real = real_rows(model, side, batch, logits)
        return kl.mean() if real is None else kl.flatten()[real].sum() / max(int(real.sum()), 1)

    return distance


def distill_hidden(
    model: nn.Module,
    dense: nn.Module,
    sites: Sequence[FFNSite],
    output_loss: OutputLoss | Literal["logits"] | None = None,
    *,
    kept_bytes: int = 0,
) -> Objective:
    """Mean over the blocks that a batch runs of |h - h_dense|^2 / |h_dense|^2, the norms over the real tokens together,
    + output_loss, of which "logits" is `logits_kl`.

    A token counts as at most LONGEST times the median one: in many decoders the first has a thousand times that, and
    would drown out the others.
    h is what leaves the block that the FFN sits in: the nearest module around it that is an entry of a
    ModuleList or Sequential, else the FFN's last linear layer. kept_bytes: of what the dense model gave, kept for when
    the same batch comes again.
    """
    names = list(dict.fromkeys(block_of(model, site) for site in sites))
    _check_teacher(model, dense, names)
    kept, steady = Remembered(kept_bytes), _Steady()
    by_logits = isinstance(output_loss, str)
    distance: OutputLoss | None = logits_kl(model) if isinstance(output_loss, str) else output_loss

    def dense_states(batch: Batch, of: Sequence[str] = names) -> tuple[dict[str, list[Tensor]], Any]:
        with torch.no_grad(), padded(), outputs(dense, of) as targets:
            output = run(dense, to_device(batch, device_of(dense)))
        wanted = _logits(output) if by_logits else output if distance is not None else None
        return targets, _here(model, dense, wanted)

    def objective(batch: Batch, index: int | None = None) -> Tensor:
        targets, wanted = kept.get(index, lambda: dense_states(batch))
        ran = [name for name in names if targets[name]]  # a batch of text alone runs no tower for images
        if not ran:
            raise ValueError(
                f"a batch reaches none of {', '.join(names)}: leave it out, or leave these out by a filter"
            )
        steady.check(targets[ran[-1]], lambda: dense_states(batch, ran[-1:])[0][ran[-1]])
        with padded(), outputs(model, names) as hidden:
            given = run(model, batch)
        if differing := [name for name in names if len(hidden[name]) != len(targets[name])]:
            raise ValueError(
                f"teacher must run the blocks that the model runs, but runs {differing[0]} "
                f"{len(targets[differing[0]])} times, not {len(hidden[differing[0]])}"
            )
        pairs = [(name, h, t) for name in ran for h, t in zip(hidden[name], targets[name], strict=True)]
        for name, h, t in pairs:
            if h.shape != t.shape:
                raise ValueError(
                    "teacher must be a model of the same sizes, but what leaves blocks differs: "
                    f"{name} {list(h.shape)}, not {list(t.shape)}"
                )
        if cut := [name for name in ran if _is_cut_off(model.get_submodule(name), hidden[name])]:
            raise no_gradient(f"to compare what leaves {cut[0]} by")
        errors = [_relative_error(h, t, real_rows(model, name, batch, h)) for name, h, t in pairs]
        error = torch.stack([one.to(errors[0].device) for one in errors]).mean()
        return error if distance is None else error + distance(given, wanted, batch)

    return objective


def _here(model: nn.Module, teacher: nn.Module, output: Any) -> Any:
    """What a teacher, perhaps on another device, gave, on the model's."""
    here = device_of(model)
    return output if device_of(teacher) == here else to_device(output, here)


def _check_teacher(model: nn.Module, teacher: nn.Module, blocks: Sequence[str]) -> None:
    """Raises ValueError where the teacher is the model itself, or a model of other blocks."""
    if unwrapped(teacher) is unwrapped(model):
        raise ValueError("teacher is the model that is trained itself: pass a copy of it from before")
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if shared := [trained[id(p)] for p in teacher.parameters() if id(p) in trained]:
        raise ValueError(
            f"teacher has {shared[0]} of the model that is trained, and would change with it: pass a copy.deepcopy"
        )
    if missing := [name for name in blocks if not is_module(teacher, name)]:
        raise ValueError(f"teacher must be a model of the same blocks, but has no {', '.join(missing)}")
    for name in dict.fromkeys(name.rpartition(".")[0] for name in blocks):
        own, its = model.get_submodule(name), teacher.get_submodule(name)
        if isinstance(own, nn.ModuleList) and isinstance(its, nn.ModuleList) and len(own) != len(its):
            raise ValueError(
                f"teacher must be a model of the same blocks, but has {len(its)} in {name}, the model {len(own)}"
            )


class _Steady:
    """Whether a teacher gives the same again, asked once: what draws random numbers cannot be learnt from."""

    def __init__(self) -> None:
        self.known = False

    def check(self, once: Iterable[Tensor], again: Callable[[], Iterable[Tensor]]) -> None:
        """Raises ValueError the first time, unless it does."""
        if not self.known:
            check_repeats(once, again(), "teacher")
            self.known = True


class Remembered:
    """Results by index, kept as long as all their tensors together fit in `limit` bytes."""

    def __init__(self, limit: int):
        self.free = limit
        self.results: dict[int, Any] = {}

    def get(self, index: int | None, make: Callable[[], Any]) -> Any:
        """The result of that index: the one kept, or a new one. None is never kept."""
        if index in self.results:
            return self.results[index]
        result = make()
        if index is not None and (size := _bytes(result)) <= self.free:
            self.free -= size
            self.results[index] = result
        return result


def _bytes(result: Any) -> int:
    """Of memory that the tensors inside hold alive; what several of them share counts once."""
    storages, objects = {}, [result]
    seen: set[int] = set()
    while objects:
        for leaf in tree_leaves(objects.pop()):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif hasattr(leaf, "__dict__") and id(leaf) not in seen:  # such as a cache of keys and values
                seen.add(id(leaf))
                objects.append(list(vars(leaf).values()))
    return sum(storages.values())


def block_of(model: nn.Module, site: FFNSite) -> str:
    """Path of the module whose output `distill_hidden` compares for this FFN."""
    path = site.name
    while path:
        parent = path.rpartition(".")[0]
        if path != site.name and isinstance(
            unwrapped(model.get_submodule(parent)), nn.ModuleList | nn.Sequential
        ):
            return path
        path = parent
    if site.adapter == "projection":  # in a teacher a linear layer
        return site.name
    down = join(site.block, site.parts.down)  # converted, a passthrough is there, or the MoE layer around it
    return down if is_module(model, down) else site.name


@contextmanager
def outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, everything that leaves the named modules: name -> one hidden state [..., d] for each time it
    ran."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not is_recomputed():
            state = next((t for t in floats_in(output) if t.dim() > 1), None)
            if state is None:
                raise TypeError(
                    f"{name} returns {_kind(output)}, in which no hidden state [..., d] is seen to compare: let it "
                    "return a tensor, or what begins with one"
                )
            seen[name].append(state)

    with hooks_on(model.get_submodule(name).register_forward_hook(partial(record, name)) for name in names):
        yield seen


@contextmanager
def padded() -> Iterator[None]:
    """Inside, nn.TransformerEncoder leaves padding in its hidden states, as it does in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _is_cut_off(block: nn.Module, states: Iterable[Tensor]) -> bool:
    """Whether the block is trained, and nothing that left it has a gradient."""
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
    return trained and not any(state.requires_grad for state in states)


def _relative_error(h: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """|h - target|^2 / |target|^2 over the real rows, the longest of which count less; the others are made 0, which is
    quicker than to pick rows. Waits for no device."""
    h, target = h.float().flatten(0, -2), target.to(h.device).float().flatten(0, -2)
    wrong, sizes = h - target, target.square().sum(-1)
    if real is not None:
        wrong, sizes = wrong.where(real.unsqueeze(-1), 0), sizes.where(real, torch.nan)
    most = torch.maximum(LONGEST * sizes.nanmedian(), LEAST * sizes.nanmean())  # NaN where there are none
    sizes = sizes.nan_to_num(0)
    weight = torch.where(sizes > most, most / sizes, 1.0)
    tiny = torch.finfo(torch.float32).tiny
    return (weight * wrong.square().sum(-1)).sum() / (weight * sizes).sum().clamp(min=tiny)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else _field(output, "logits")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the logits of a model are a Tensor that it returns, or .logits; this one gives {type(output).__name__}: "
            "leave out what asks for them (of sparsify_ the objective, of fine-tuning output_loss)"
        )
    return logits.float()


def own_loss(output: Any) -> Any:
    """What a model that was given labels returns as its loss, None where there is none."""
    return _field(output, "loss")


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
