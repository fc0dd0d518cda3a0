"""Fine-tuning of a converted model while it skips experts: what makes whole experts dispensable, not only neurons."""

import logging
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sadmoe.batches import Batches, check_batches, settle
from sadmoe.checks import check_config, check_range
from sadmoe.dial import gates_of, set_gates, trainable_layers
from sadmoe.ffn import site_of
from sadmoe.forward import no_gradient
from sadmoe.gates import DynamicK, Gate
from sadmoe.hooks import LatestCall
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import device_of, mode, refuse_compiled, refuse_distributed
from sadmoe.padding import ran, real_part
from sadmoe.randomness import seeded
from sadmoe.sparsify.penalty import square_hoyer
from sadmoe.training.config import LoopConfig, Step
from sadmoe.training.guards import all_or_nothing
from sadmoe.training.loop import train
from sadmoe.training.objective import Loss, OutputLoss, check_output_loss, distill_hidden, task
from sadmoe.training.processes import is_same, mean_over_processes, place
from sadmoe.training.resume import Checkpoint, Kept, check_checkpoint, held_to

logger = logging.getLogger(__name__)
MEMORY = 0.9  # decay of the running mean of the executed share, per update


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """How a converted model is fine-tuned. Give `steps`, which makes the run repeatable, or `seconds`.

    alpha weighs the penalty: square Hoyer of the experts' norms, divided by E.

    tau: threshold on the experts' true norms while training. None: the model's own gates pick the experts, which so
        learn to do with what their routers give them; share, alpha and ramp then mean nothing: there is no penalty.
    ramp: share of the run in which tau rises from 0.
    share: executed share to reach: while it is below, the penalty rests.
    kept_bytes: of what the dense model gives, kept for when the same batch comes again, of a list, a tuple, or another
        sequence whose attribute `same_again` is True.
    """

    lr: float = 5e-4
    tau: float | None = 0.1
    ramp: float = 0.5
    share: float = 0.3
    kept_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None:
            DynamicK(self.tau)  # checks the range
        if not 0 <= self.ramp <= 1:
            self._refuse(f"ramp must be a share of the run in [0, 1], got {self.ramp}")
        if not 0 < self.share <= 1:
            self._refuse(f"share must be in (0, 1], got {self.share}")
        check_range(self, "kept_bytes", least=0)


@dataclass(frozen=True)
class FinetuneReport:
    """The history of a run, and the executed share on true norms at the threshold of the run, a running mean; None
    where the model's own gates picked."""

    history: list[Step]
    share: float | None
    seconds: float

    def __str__(self) -> str:
        last = self.history[-1]
        done = (
            f"{len(self.history)} updates in {self.seconds:.0f} s, the last: objective {last.objective:.4f}"
        )
        if self.share is None:
            return done
        return f"{done}, penalty {last.penalty:.4f}; the experts' true norms execute {self.share:.1%}"


def finetune_(
    model: nn.Module,
    batches: Batches,
    config: FinetuneConfig,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    output_loss: OutputLoss | Literal["logits"] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> FinetuneReport:
    """Fine-tunes a converted model in place while experts of small norm are skipped: objective + alpha * penalty.

    Experts are picked by their true norms, with a threshold that rises to `config.tau`, and the mask is held constant
    in the gradient. The penalty is the square Hoyer of the norms of a token's experts, divided by E. Routers are not
    trained, and know nothing of what was learned: `fit_routers_` afterwards. The gates come back as they were. With
    `config.tau` None the gates pick as they do in use, so a last run after `fit_routers_` fits the experts to them.

    The objective is the relative error of the hidden states of `teacher`, the dense model, after every block (see
    `sparsify_`), or loss(model, batch) -> scalar, or without both the model's own `.loss`. To the first,
    output_loss(model's output, teacher's output, batch) -> scalar is added: what the outputs are used for. "logits" is
    KL(teacher || model) of the logits, mean over the real tokens or samples, for classifiers and language models.
    checkpoint: where to resume from after a kill, see `Checkpoint`.
    Raises ValueError and TypeError for wrong input, FloatingPointError where the loss is not finite. Whatever is
    raised, the model is as it was before, bit for bit.
    """
    check_config(config, FinetuneConfig)
    check_checkpoint(checkpoint)
    check_batches(batches)
    refuse_distributed(model)
    if teacher is not None or config.tau is not None:  # modules are listened to
        refuse_compiled(model)
    if teacher is not None:
        refuse_compiled(teacher, "teacher")
    layers = trainable_layers(model)
    if teacher is not None and loss is not None:
        raise ValueError("give teacher or loss, not both: the objective is one of them")
    if output_loss is not None and teacher is None:
        raise ValueError("output_loss compares with the dense model's output: give it as teacher")
    if teacher is not None:
        check_output_loss(output_loss)
    started = time.perf_counter()
    with (
        all_or_nothing(model),
        mode(model, train=teacher is None),
        nullcontext() if teacher is None else mode(teacher, train=False),
        seeded(model, config.seed),
    ):
        if teacher is None:
            objective = task(model, loss)
        else:
            sites = [site_of(layer, name) for name, layer in layers.items()]
            objective = distill_hidden(model, teacher, sites, output_loss, kept_bytes=config.kept_bytes)
            settle(model, batches)
        loop = config if config.tau is not None else replace(config, alpha=0.0)
        kept = Kept(checkpoint, "finetune", {})
        if checkpoint is not None:
            acts = {name: layer.act for name, layer in layers.items()}
            kept = replace(kept, run={"acts": acts, **held_to(teacher, loss=loss, output_loss=output_loss)})
        run = partial(train, model, batches, loop, objective, progress=progress)
        share = None
        if config.tau is None:
            gates = {name: _said(layer.gate) for name, layer in layers.items()}
            _check_same(gates, device_of(model))
            with hidden_kept(layers):
                history = run(kept=replace(kept, run={**kept.run, "gates": gates}))
        else:
            with ExpertPenalty(model, layers, config) as penalty:
                history = run(penalty, at=penalty.at, kept=kept)
            share = penalty.share
    report = FinetuneReport(history, share, time.perf_counter() - started)
    logger.info("fine-tuned %d converted FFNs: %s", len(layers), report)
    return report


def _said(gate: Gate) -> str:
    """Its rule and settings, of a gate of the user's own at least the class."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(gate)) if is_dataclass(gate) else type(gate).__name__


def _check_same(gates: Mapping[str, str], device: torch.device) -> None:
    """Raises RuntimeError where processes of a group would train under different gates."""
    if not is_same(zlib.crc32(repr(gates).encode()), device):
        raise RuntimeError(
            "the gates of this process are not those of the others, as after calibrate_ on each one's own batches: "
            "calibrate in one process and give all its tau by set_tau, or load the calibrated model in each"
        )


@contextmanager
def hidden_kept(layers: Mapping[str, DynamicKMoE]) -> Iterator[None]:
    """Inside, the layers compute all experts and keep what their backward pass needs."""
    for layer in layers.values():
        layer.keeps_hidden = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.keeps_hidden = False


def trains(layer: DynamicKMoE) -> bool:
    """Whether any of its own parameters requires a gradient, its router's aside."""
    return any(p.requires_grad for p in layer.parameters(recurse=False))


class ExpertPenalty:
    """Gates on true norms inside, and the penalty of the passes since it was last called."""

    def __init__(self, model: nn.Module, layers: Mapping[str, DynamicKMoE], config: FinetuneConfig):
        assert config.tau is not None
        self.model, self.layers, self.config, self.tau = model, layers, config, config.tau
        self.gates = gates_of(layers)
        self.call = LatestCall(model)
        self.seen: dict[str, list[tuple[Tensor, Any]]] = {name: [] for name in layers}
        self.hooks = {name: partial(self._see, name) for name in layers}
        self.sum, self.weight = 0.0, 0.0  # of the executed shares so far, the latest weighing most
        calls = config.accumulate / place()[1]  # of an update, each of which takes its part of the decay
        self.decay = MEMORY ** (1 / calls)

    def __enter__(self) -> "ExpertPenalty":
        self.call.__enter__()
        for name, layer in self.layers.items():
            layer.norms_hooks.append(self.hooks[name])
        return self

    def __exit__(self, *exc: object) -> None:
        self.call.__exit__(*exc)
        for name, layer in self.layers.items():
            layer.norms_hooks.remove(self.hooks[name])
        set_gates(self.layers, self.gates)

    def _see(self, name: str, norms: Tensor) -> None:
        self.seen[name].append((norms, self.call.given))

    @property
    def share(self) -> float:
        """The executed share, a running mean."""
        return self.sum / self.weight if self.weight else 1.0

    def state_dict(self) -> dict[str, float]:
        """What it remembers from update to update."""
        return {"sum": self.sum, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.sum, self.weight = state["sum"], state["weight"]

    def at(self, done: float) -> None:
        """Sets the threshold of the moment when the share `done` of the run is over."""
        risen = min(done / self.config.ramp, 1.0) if self.config.ramp else 1.0
        gate = DynamicK(self.tau * risen, true_norms=True)
        set_gates(self.layers, dict.fromkeys(self.layers, gate))

    def __call__(self, batch: Any) -> Tensor:
        values, shares, device = [], [], device_of(self.model)
        for name, passes in self.seen.items():
            for norms, given in passes:
                kept = real_part(self.model, name, ran(batch, given), norms)
                if not len(kept):  # a batch of padding alone
                    continue
                values.append((square_hoyer(kept).mean() / kept.shape[1]).to(device))
                shares.append(self.layers[name].gate.mask(kept.detach()).float().mean().to(device))
            passes.clear()
        now = mean_over_processes(torch.stack(shares).mean().item() if shares else self.share, device)
        self.sum = self.decay * self.sum + (1 - self.decay) * now
        self.weight = self.decay * self.weight + (1 - self.decay)
        mean = torch.stack(values).mean() if values else torch.zeros((), device=device)
        if (
            values
            and torch.is_grad_enabled()
            and not mean.requires_grad
            and any(map(trains, self.layers.values()))
        ):
            raise no_gradient()
        return mean if self.share > self.config.share else mean.detach()
