"""Sparsity fine-tuning inside `transformers.Trainer`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sadmoe.ffn import find_ffns, swap_activations_
from sadmoe.sparsify import SparsifyConfig, SparsityLoss
from sadmoe.sparsify.config import Schedule
from sadmoe.sparsify.penalty import Penalty


class SparsityCallback(TrainerCallback):
    """Adds alpha * `SparsityLoss` to the loss that the model returns, while a Trainer trains it.

        Trainer(model, arguments, train_dataset=data, callbacks=[SparsityCallback(alpha=0.3)]).train()

    alpha, schedule, penalty, displacement, relu_swap: as in `SparsifyConfig`; the schedule follows the Trainer's steps,
    so it goes on where it was when training resumes from a checkpoint.   filter: which FFNs, as in `find_ffns`.
    Works with gradient accumulation, non-reentrant checkpointing, mixed precision and several processes. The logged
    loss has the penalty in it, the evaluation's has not; `last` is the latest penalty, without alpha. After a run that
    raised an error, `stop()` takes the callback off the model.
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
        filter: Callable[[str], bool] | None = None,
    ):
        self.config = SparsifyConfig(  # which checks them; of a length that nothing here uses
            steps=1,
            alpha=alpha,
            schedule=schedule,
            penalty=penalty,
            displacement=displacement,
            relu_swap=relu_swap,
        )
        self.filter = filter
        self.alpha = 0.0
        self._in_step = False
        self.last: Tensor | None = None
        self._arguments: Any = None
        self._sparsity: SparsityLoss | None = None
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Swaps the activations, and starts to watch the model."""
        if args.n_gpu > 1:
            raise ValueError(
                f"SparsityCallback needs one device a process, got {args.n_gpu} in this one: launch with torchrun"
            )
        self.stop()  # what an earlier run that failed left
        model = kwargs["model"]
        sites = find_ffns(model, self.filter)
        if self.config.relu_swap:
            swap_activations_(model, sites, "relu")
        self._arguments = args
        self._sparsity = SparsityLoss(
            model, sites, penalty=self.config.penalty, displacement=self.config.displacement
        ).__enter__()
        self._handle = model.register_forward_hook(self._add, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the weight of the moment."""
        self._in_step = True
        self.alpha = self.config.alpha_at((state.global_step + 0.5) / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds nothing to what the model says outside a step, so also after a run that failed between two."""
        self._in_step = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the model as any other."""
        self.stop()

    def stop(self) -> None:
        """Leaves the model as any other: of itself at the end of a run; call it after one that raised an error."""
        self._in_step = False
        if self._handle is not None:
            self._handle.remove()
        if self._sparsity is not None:
            self._sparsity.__exit__()
        self._handle = self._sparsity = None

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: the output with the penalty in its loss, in training."""
        assert self._sparsity is not None
        if not self._in_step or not model.training or not torch.is_grad_enabled():
            self._sparsity.forget()
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                "SparsityCallback adds to the loss that the model returns, and it returned none: leave labels in the "
                "batches and label smoothing and compute_loss_func out, or use SparsityLoss in your own compute_loss"
            )
        penalty = self._sparsity(kwargs)
        self.last = penalty.detach()
        loss = loss + self.alpha / self._divisor(kwargs) * penalty.to(loss.device)
        if isinstance(output, Mapping):
            output["loss"] = loss  # type: ignore[index]
            return output
        return (loss, *output[1:])

    def _divisor(self, kwargs: dict[str, Any]) -> float:
        """By what the Trainer would have divided a mean, where the model has done so already for its own loss."""
        if kwargs.get("num_items_in_batch") is None:
            return 1.0
        arguments = self._arguments
        multiplied = arguments.world_size if arguments.average_tokens_across_devices else 1
        return float(arguments.gradient_accumulation_steps * multiplied)
