"""What a training loop leaves on disk, so that a killed run goes on where it last saved.

One safetensors file for each run, written beside its path and renamed, so that a kill leaves the old one or the new
one. It holds the trained weights, the buffers that a state_dict has, and AdamW's moments; its metadata key "sadmoe run"
is JSON:
  format   version of all this
  run      what the run is of: its configuration, the names of what is trained, checksums of the weights it began with
  state    updates done, their history, seconds, what the penalty remembers
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sadmoe import files
from sadmoe.checks import check_fields
from sadmoe.training.guards import put_in
from sadmoe.training.processes import place

FORMAT = 8
KEY = "sadmoe run"
CHECKSUMS = ("weights", "model", "teacher")  # what is known of a run by a checksum alone


@dataclass(frozen=True)
class Checkpoint:
    """A folder in which a long step leaves its state, and how often.

    Call the same function again with the same model, batches, configuration, teacher, loss and folder: it goes on where
    it was. A different run is refused, where the difference can be told (losses are known by their names alone). A run
    that had ended is not repeated: its result is loaded.   every: seconds between two saves; 0: after each update. Give
    each step a folder of its own, and keep the number of threads: what a run begins with is compared bit for bit. With
    several processes the first one writes, and all must see the folder.
    """

    folder: str | os.PathLike[str]
    every: float = 60.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.every >= 0:  # inf: at the end alone
            raise ValueError(f"Checkpoint: every must be at least 0 seconds, got {self.every}")

    def file(self, name: str) -> Path:
        """Where the run `name` is kept."""
        return Path(self.folder) / f"{name or 'run'}.safetensors"


def check_checkpoint(checkpoint: Any) -> None:
    """Raises TypeError unless it is a Checkpoint, or None; OSError where it is new and cannot be written, which the
    first save would tell else."""
    if checkpoint is None:
        return
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            f"checkpoint must be a Checkpoint or None, got {checkpoint!r}: give Checkpoint(folder)"
        )
    folder = Path(checkpoint.folder).absolute()
    if place()[0] != 0 or any(folder.rglob("*.safetensors")):  # which writes nothing, or may only be read
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"checkpoint: {there} is no folder: give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"checkpoint: nothing can be written into {there}: give another folder")


@runtime_checkable
class Stateful(Protocol):
    """What remembers something from update to update."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def write(path: Path, tensors: Mapping[str, Tensor], run: dict[str, Any], state: dict[str, Any]) -> None:
    """Replaces the file at once. What differs from `run` when it is read is another run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")  # always the same, so that kills leave one at most
    files.write(path, files.plain(tensors), KEY, {"format": FORMAT, "run": run, "state": state}, beside)


def read(path: Path, run: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the run, None where nothing was saved. Raises ValueError where it is of another run."""
    if not path.exists():
        return None
    try:
        tensors, header = files.read(path, KEY)
        saved, version, state = header["run"], header["format"], header["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} is no saved run of sadmoe, or is damaged: {error}") from error
    if version != FORMAT:
        earlier = isinstance(version, int) and version < FORMAT
        advice = "begin anew in an empty folder" if earlier else "update sadmoe"
        raise ValueError(f"checkpoint: {path} has format {version}, this sadmoe reads {FORMAT}: {advice}")
    wanted = json.loads(json.dumps(run))
    if differing := [key for key in wanted.keys() | saved.keys() if wanted.get(key) != saved.get(key)]:
        told = "; ".join(_told(key, saved.get(key), wanted.get(key)) for key in sorted(differing))
        raise ValueError(
            f"checkpoint: {path} is of another run: {told}. Give that run again, or an empty folder"
        )
    return tensors, state


def _told(key: str, saved: Any, wanted: Any) -> str:
    """What differs, in words: of two configs, the fields; of checksums, that they do."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        fields = [
            name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)
        ]
        return ", ".join(_told(f"{key}.{name}", saved.get(name), wanted.get(name)) for name in fields)
    if key == "trained":  # None of a run of another kind
        return f"{key} differs by {', '.join(sorted(set(saved or ()) ^ set(wanted or ()))[:3])}"
    if (what := key.rpartition(".")[2]) == "teacher" and None in (saved, wanted):
        return "it had no teacher" if saved is None else "it had a teacher"
    if what in CHECKSUMS:
        return f"the bits of its {what} were others"
    return f"{key} was {saved}, is {wanted}"


def held_to(teacher: nn.Module | None, **losses: Any) -> dict[str, Any]:
    """What a run is trained towards, as far as a checkpoint can know it: the teacher's weights and buffers, the losses'
    names."""
    names = {
        name: loss
        if loss is None or isinstance(loss, str)
        else getattr(loss, "__qualname__", type(loss).__name__)
        for name, loss in losses.items()
    }
    weights = None if teacher is None else files.checksum(dict(teacher.state_dict()))
    return {"teacher": weights, **names}


def _as_laid_out(parameter: Tensor, moment: Tensor) -> Tensor:
    """The moment in the order that the parameter has in memory (channels_last for one): a fused AdamW goes by that."""
    if moment.shape != parameter.shape:  # the number of steps
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


@dataclass(frozen=True)
class Kept:
    """What one part of a long step comes to, on disk: a file of its own, nothing without a checkpoint.

    run: what it is a function of, but for the batches.
    """

    checkpoint: Checkpoint | None
    name: str
    run: dict[str, Any]

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state, if they were saved."""
        return None if self.checkpoint is None else read(self.checkpoint.file(self.name), self.run)

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """By the first process."""
        if self.checkpoint is not None and place()[0] == 0:
            write(self.checkpoint.file(self.name), tensors, self.run, state)


class Saver:
    """Saves a training loop when it is time, and brings it back."""

    def __init__(self, kept: Kept, model: nn.Module, optimizer: torch.optim.Optimizer, memory: Any):
        self.model, self.optimizer, self.memory = model, optimizer, memory
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights = files.checksum(dict(model.named_parameters()))  # of all, frozen ones too
        self.kept = replace(kept, run={"weights": weights, "trained": sorted(self.trained), **kept.run})
        self.every = math.inf if kept.checkpoint is None else kept.checkpoint.every
        self.saved = time.perf_counter()

    def resume(self) -> dict[str, Any] | None:
        """Puts weights, moments and memory back as saved; the state that `save` was given, None at the first start."""
        found = self.kept.load()
        if found is None:
            return None
        tensors, state = found
        with torch.no_grad():
            for name, target in self._state().items():
                put_in(target, tensors[f"weights.{name}"])
        torch.clear_autocast_cache()  # an autocast around it keeps casts of what was there
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self.trained.items()}
        moments = {
            i: {
                key: _as_laid_out(p, tensors[f"{key}.{names[id(p)]}"])
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for i, p in enumerate(order)
            if f"step.{names[id(p)]}" in tensors
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if isinstance(self.memory, Stateful):
            self.memory.load_state_dict(state["memory"])
        return state

    def save(self, state: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Writes if it is time, or at the last update. state: asked for what `resume` will return, only then, as a long
        history takes time."""
        if place()[0] != 0 or not (last or time.perf_counter() - self.saved >= self.every):
            return
        tensors = {f"weights.{name}": t for name, t in self._state().items()}
        for name, p in self.trained.items():
            tensors |= {f"{key}.{name}": t for key, t in self.optimizer.state.get(p, {}).items()}
        memory = self.memory.state_dict() if isinstance(self.memory, Stateful) else None
        self.kept.save(tensors, {**state(), "memory": memory})
        self.saved = time.perf_counter()

    def _state(self) -> dict[str, Tensor]:
        """What training changes, by name. Buffers that no state_dict has, such as tables of positions, are made anew by
        a forward pass, in whatever size it needs."""
        lasting = self.model.state_dict(keep_vars=True)
        return {**self.trained, **{n: b for n, b in self.model.named_buffers() if n in lasting}}
