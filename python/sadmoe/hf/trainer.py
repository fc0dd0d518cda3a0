"""Sparsity fine-tuning and router fitting inside `transformers.Trainer`."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sadmoe.batches import Batches
from sadmoe.checks import Filter
from sadmoe.dial import tau
from sadmoe.ffn import find_ffns, swap_activations_
from sadmoe.ffn.activation_swap import Undo
from sadmoe.modules import evaluating, refuse_compiled
from sadmoe.passes import PassesLoss
from sadmoe.reference import RECTIFIERS
from sadmoe.router_loss import RouterLoss
from sadmoe.routers import RouterConfig
from sadmoe.sparsify import SparsifyConfig, SparsityLoss
from sadmoe.sparsify.penalty import Penalty
from sadmoe.training.config import Schedule


class AddedLoss(TrainerCallback):
    """Adds `alpha` times a term to the loss that the model returns, while a Trainer trains it.

    `last` is the latest term, without alpha. After a run that raised an error, `stop()` takes the callback off.
    """

    def __init__(self) -> None:
        self.alpha = 0.0
        self.last: Tensor | None = None
        self._in_step = False
        self._passes = 1  # of the step
        self._begun = False  # whether an epoch of this run has
        self._step_of_epoch = 0  # global_step where the epoch began
        self._added = 0  # terms of the step
        self._trained_on = 0  # those of them that a backward pass reached
        self._arguments: Any = None
        self._term: PassesLoss | None = None
        self._handles: list[RemovableHandle] = []

    def check(self, arguments: Any) -> None:
        """Raises ValueError where the Trainer would run several devices in this process, or take the labels from the
        model, whose loss this adds to."""
        if arguments.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} needs one device a process, got {arguments.n_gpu} in this one: launch with "
                "torchrun"
            )
        if arguments.label_smoothing_factor:
            raise ValueError(
                f"{type(self).__name__} is in the loss that the model returns: leave label smoothing out"
            )

    def watch(self, model: nn.Module, term: PassesLoss, arguments: Any) -> None:
        """Begins to watch the model."""
        self._arguments = arguments
        self._begun = False
        term.__enter__()
        self._term = term
        self._handles.append(model.register_forward_hook(self._add, with_kwargs=True))

    def unwatch(self) -> None:
        """Takes the hooks off, also those of an earlier run that failed."""
        self._in_step = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._term is not None:
            self._term.__exit__()
        self._term = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the step. A run that goes on inside an epoch leaves out the batches of its steps, unless told not to;
        then it begins the epoch again."""
        self._step_of_epoch = state.global_step
        if not self._begun and not args.ignore_data_skip and (steps := _steps_of_epoch(args, kwargs)):
            self._step_of_epoch -= state.global_step % steps
        self._begun = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on passes in training are the step's."""
        self._in_step = True
        self._added = self._trained_on = 0
        if self._term is not None:
            self._term.forget()  # passes of modules inside, between steps
        self._passes = args.gradient_accumulation_steps
        if batches := _batches_of_epoch(kwargs):  # the last step has what is left
            done = self._passes * (state.global_step - self._step_of_epoch)
            self._passes = max(1, min(self._passes, batches - done))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds nothing to what the model says outside a step, so also after a run that failed between two. Raises
        ValueError where the loss with the term in it was not what was trained on."""
        self._in_step = False
        if self._added and not self._trained_on:
            raise ValueError(
                f"{type(self).__name__} adds to the loss that the model returns, and that was not trained on: a "
                "compute_loss of your own makes another; add SparsityLoss or RouterLoss to that one, without a callback"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the model as any other."""
        self.stop()

    def stop(self) -> None:
        """Leaves the model as any other: of itself at the end of a run; call it after one that raised an error."""
        self.unwatch()

    def counts(self, model: nn.Module) -> bool:
        """Whether a pass that runs now is one of training."""
        return self._in_step and model.training and torch.is_grad_enabled()

    def with_term(self, loss: Tensor | None, term: Tensor) -> Tensor:
        """The loss that is trained on, from the model's own, None where it gave none."""
        if loss is None:
            raise ValueError(
                f"{type(self).__name__} adds to the loss that the model returns, and it returned none: leave labels in "
                "the batches and compute_loss_func out, or add the term in your own compute_loss"
            )
        return loss + term.to(loss.device)

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: the output with the term in its loss, in training."""
        assert self._term is not None
        if not self.counts(model):
            self._term.forget()
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            loss = None
        term = self._term(kwargs)
        self.last = term.detach()
        scaled = self.alpha / self._divisor(kwargs) * term
        if scaled.requires_grad and not torch.compiler.is_compiling():
            self._added += 1
            scaled.register_hook(self._reached)
        total = self.with_term(loss, scaled)
        if isinstance(output, Mapping):
            output["loss"] = total  # type: ignore[index]
            return output
        return (total, *(output if loss is None else output[1:]))

    def _reached(self, gradient: Tensor) -> None:
        self._trained_on += 1

    def _divisor(self, kwargs: dict[str, Any]) -> float:
        """By what the Trainer would have divided a mean, where the model has done so already for its own loss."""
        if kwargs.get("num_items_in_batch") is None:
            return 1.0
        arguments = self._arguments
        multiplied = arguments.world_size if arguments.average_tokens_across_devices else 1
        return float(self._passes * multiplied)


def _batches_of_epoch(given: Mapping[str, Any]) -> int:
    """By what a callback is given; 0 where it is not told, as of an iterable dataset."""
    try:
        return len(given["train_dataloader"])
    except (KeyError, TypeError):
        return 0


def _steps_of_epoch(arguments: Any, given: Mapping[str, Any]) -> int:
    return math.ceil(_batches_of_epoch(given) / arguments.gradient_accumulation_steps)


class SparsityCallback(AddedLoss):
    """Adds alpha * `SparsityLoss` to the loss that the model returns, while a Trainer trains it.

        Trainer(model, arguments, train_dataset=data, callbacks=[SparsityCallback(alpha=0.3)]).train()

    alpha, schedule, penalty, displacement, relu_swap: as in `SparsifyConfig`; the schedule follows the Trainer's steps,
    so it goes on where it was when training resumes from a checkpoint.   filter, batches: which FFNs, and by what they
    are found, as in `find_ffns`. Works with gradient accumulation, non-reentrant checkpointing, mixed precision and
    several processes. The logged loss has the penalty in it, the evaluation's has not; `last` is the latest penalty,
    without alpha. After a run that raised an error, `stop()` takes the callback off the model, and gives it back its
    activations unless an update had begun.
    Raises ValueError where the Trainer makes the loss itself (label smoothing, compute_loss_func): use `SparsityLoss`
    in a compute_loss of your own instead. Source: arXiv 2310.04361, section 3.1.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        schedule: Schedule = "linear_warmup",
        penalty: Penalty = "hoyer",
        displacement: float = -10.0,
        relu_swap: bool = True,
        filter: Filter | None = None,
        batches: Batches | None = None,
    ):
        super().__init__()
        self.config = SparsifyConfig(  # which checks them; of a length that nothing here uses
            steps=1,
            alpha=alpha,
            schedule=schedule,
            penalty=penalty,
            displacement=displacement,
            relu_swap=relu_swap,
        )
        self.filter, self.batches = filter, batches
        self._swap_back: Undo | None = None  # of a model whose weights are as they were

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Swaps the activations, and starts to watch the model."""
        self.check(args)
        self.stop()  # a run may have failed before
        model = kwargs["model"]
        refuse_compiled(model)  # before its activations are swapped
        sites = find_ffns(model, self.filter, batches=self.batches)
        if self.config.relu_swap:
            undo = swap_activations_(model, [site for site in sites if site.act not in RECTIFIERS], "relu")
            self._swap_back = undo if state.global_step == 0 else None
        term = SparsityLoss(model, sites, penalty=self.config.penalty, displacement=self.config.displacement)
        self.watch(model, term, args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the weight of the moment."""
        super().on_step_begin(args, state, control, **kwargs)
        self.alpha = self.config.alpha_at((state.global_step + 0.5) / state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on the weights are those of a model with the new activations."""
        self._swap_back = None

    def stop(self) -> None:
        """Leaves the model as any other: of itself at the end of a run; call it after one that raised an error."""
        super().stop()
        if self._swap_back is not None:
            self._swap_back()
            self._swap_back = None


class RouterCallback(AddedLoss):
    """Fits the routers of a converted model while a Trainer trains it: alpha * `RouterLoss`.

        Trainer(model, arguments, train_dataset=data, callbacks=[RouterCallback()]).train()

    alone: whether only the routers are trained, until the Trainer's run ends. Passes of training are then as in
    evaluation and at tau = 0, the term is the whole loss and labels are not needed; gates, also as saved, stay as they
    are. False: beside all that asks for gradients, with gates that pick as in use, and the term is added to the loss
    that the model returns.   alpha: its weight.   target_power: see `RouterLoss`.
    `last` is the latest term: 1 - R² of the routers on a batch, mean over layers. Works with gradient accumulation,
    non-reentrant checkpointing, mixed precision and several processes. After a run that raised an error, `stop()` takes
    the callback off the model.   Give it to Trainer(callbacks=...): the optimizer has to know of the routers.
    Source: arXiv 2310.04361, section 3.
    """

    def __init__(self, alpha: float = 1.0, *, alone: bool = True, target_power: float | None = None):
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        self.alpha, self.alone = alpha, alone
        self.target_power = RouterConfig(target_power=target_power).target_power  # which is checked
        self._asked: dict[nn.Parameter, bool] = {}
        self._dense = ExitStack()  # what holds for a pass

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what is trained, before the Trainer makes its optimizer."""
        self.stop()  # it may have been another Trainer's
        self.check(args)
        model = kwargs["model"]
        routers = RouterLoss(model).weights
        self._asked = {p: p.requires_grad for p in model.parameters()}
        for p in model.parameters() if self.alone else ():
            p.requires_grad_(False)
        for p in routers:
            p.requires_grad_()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to watch the model."""
        model = kwargs["model"]
        term = RouterLoss(model, target_power=self.target_power)
        if any(type(v.data) is not Tensor for v in term.weights):
            raise ValueError(
                "RouterCallback: the routers are split over processes, as FSDP and tensor parallelism do it, and are "
                "fitted whole: train them by torchrun without these, or by fit_routers_(model, batches) beforehand"
            )
        if not all(p in self._asked for p in model.parameters()):
            raise ValueError(
                "RouterCallback came after the Trainer, has been stopped, or the Trainer has made another model since "
                "(model_init): give a new one to a new Trainer(model, callbacks=[RouterCallback(...)])"
            )
        self.unwatch()
        optimizer = kwargs.get("optimizer")
        known = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        # Of the model itself: an optimizer of shards, or of flat copies, knows none of its parameters.
        if known & {id(p) for p in model.parameters()} and not {id(v) for v in term.weights} <= known:
            raise ValueError(
                "RouterCallback: the Trainer's optimizer does not have all routers, which asked for no gradient when "
                "it was made: make it after the Trainer, or of all of model.parameters()"
            )
        if self.alone:
            self._handles.append(model.register_forward_pre_hook(self._open))
            self._handles.append(model.register_forward_hook(self._close, always_call=True))
        self.watch(model, term, args)

    def with_term(self, loss: Tensor | None, term: Tensor) -> Tensor:
        """Alone it is the loss: nothing in the model's own could be trained."""
        return term if self.alone else super().with_term(loss, term)

    def unwatch(self) -> None:
        """Takes the hooks off, and ends a pass that Ctrl-C left open."""
        super().unwatch()
        self._dense.close()

    def stop(self) -> None:
        """Leaves the model as any other, asking for gradients as before the Trainer was made."""
        super().stop()
        for p, asked in self._asked.items():
            p.requires_grad_(asked)
        self._asked = {}

    def _open(self, model: nn.Module, args: Any) -> None:
        """Before a pass of training: what enters the layers is what the dense model would give them."""
        if self.counts(model):
            self._dense.enter_context(tau(model, 0.0))
            self._dense.enter_context(evaluating(model))

    def _close(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it, also after one that failed."""
        self._dense.close()
