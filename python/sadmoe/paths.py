"""Which path a converted layer takes: the sparse op, or dense products of torch with a mask over the hidden neurons.

Both compute the same function to rounding. The answer is one number, the executed share up to which the op is taken:
from costs measured on this machine where there are some, from the cost model of the card on a CUDA device, else from
costs that came with sadmoe.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sadmoe import crossover, measured, ops
from sadmoe.crossover import LayerShape
from sadmoe.measured import Costs, Key
from sadmoe.timing import processor

NOT_YET = -1  # instead of a count
WORTH = {"cpu": 1.1, "cuda": 1.05}  # how many times faster dense must be where nobody asked for it
SURE = 0.95  # of dense's time, at most, where the op replaces it unasked by another machine's costs
ELSEWHERE = "kernels avx512bf16"  # on a Zen 4: whose costs go for kernels that have none
ALIKE = 2.0  # the sum of |log(ratio)| over the sizes of two layers, up to which they count as alike

_costs: dict[Key, Costs] | None = None  # None: the user's file has not been read


def use_costs(rows: Iterable[Costs] | None) -> None:
    """Decide by these measurements in this process; None: by the user's file, read at the next decision.

    use_costs(measured.read(measured.cache_file(folder)).values())
    """
    global _costs
    _costs = None if rows is None else {row.key: row for row in rows}
    for answer in (sparse_until, op_runs_all):
        answer.cache_clear()


@lru_cache
def device_name(device: torch.device) -> str:
    """What measurements hold for: processor or card, kernels and torch; elsewhere torch alone computes."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if device.type != "cpu":
        return f"{device.type}, torch {torch.__version__}"
    return f"{processor()}, {kernels_name()}, torch {torch.__version__}"


def kernels_name() -> str:
    """What costs that come with sadmoe hold for."""
    return f"kernels {ops.cpu_isas()[0]}"


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def sparse_until(
    layer: LayerShape, tokens: int, device: torch.device, dtype: torch.dtype, slack: float
) -> float:
    """The executed share up to which the sparse op takes at most `slack` times what the dense path takes.

    tokens >= 1. 1.0 on the CPU where nothing tells. Reads the user's file of measurements at the first call of a
    process, and raises ValueError where it is damaged. Waits for no device.
    """
    if device.type == "cuda" and not ops.runs_kernels(device):
        return 0.0  # the op is plain torch, which computes every expert too
    if dtype not in ops.DTYPES:
        return 1.0  # the op says so
    found = _measured(layer, device, dtype)
    if found is None and device.type == "cuda":
        card = crossover.card_for(torch.cuda.get_device_capability(device))
        return crossover.crossover(layer, tokens, card, masked=True, slack=slack)
    if found is None:
        found = _nearest_built_in(layer, dtype)
    return 1.0 if found is None else found.sparse_until(tokens, slack)


@lru_cache(maxsize=4096)
def op_runs_all(layer: LayerShape, tokens: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the op runs every expert faster than torch's products, no router asked: at tau = 0.

    By what was measured on this device; on the CPU else by what came with sadmoe, if of these kernels and of a layer
    much alike. tokens >= 1. Raises ValueError as `sparse_until` does.
    """
    if device.type == "cuda" and not ops.runs_kernels(device):
        return False
    found, most = _measured(layer, device, dtype), 1.0
    if found is None and device.type == "cpu":
        found, most = _nearest_built_in(layer, dtype, alike=True), SURE
    cost = None if found is None else found.cost_of_every_expert(tokens)
    return cost is not None and cost <= most


class ShareHint:
    """The executed share of an earlier call under the same gate on a CUDA device, brought to the host without waiting
    for the device.

    Under graph capture nothing is counted, but what has arrived is seen: capture begins with a wait for the device, so
    a graph is made by the share of the calls that warmed it up.
    """

    EVERY = 16  # calls; counting adds two small kernels to one that is counted
    GATES = 8  # that are remembered

    def __init__(self) -> None:
        self._counts: list[_Count] = []  # that of the last call first

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ShareHint, ()  # a copy of a layer learns its own

    def read(self, gate: Any) -> float | None:
        """The share under this gate, None where none has arrived."""
        if not self._counts or self._counts[0].gate != gate:
            count = next((one for one in self._counts if one.gate == gate), _Count(gate))
            self._counts = [count, *(one for one in self._counts if one is not count)]
        count = self._counts[0]
        arriving = count.arriving  # another thread may let it go
        if arriving is not None and (arrived := arriving()) is not None:
            count.share = arrived
            # Not under capture, which the event would belong to that torch records when pinned memory is given back.
            if not _capturing():
                count.arriving = None
        return count.share

    def wanted(self) -> bool:
        """Whether this call, whose gate `read` was given, should be counted: `send` its mask. Asked once a call."""
        count = self._counts[0]
        if count.arriving is not None or _capturing():
            return False
        del self._counts[self.GATES :]
        count.calls += 1
        return count.share is None or count.calls % self.EVERY == 0

    def send(self, mask: Tensor) -> None:
        """Starts to count mask [T, E]."""
        self._counts[0].arriving = _on_its_way(mask)


@dataclass
class _Count:
    """What is known of the calls under one gate, and what returns the share that is on its way."""

    gate: Any
    calls: int = 0
    share: float | None = None
    arriving: Callable[[], float | None] | None = None


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _on_its_way(mask: Tensor) -> Callable[[], float | None]:
    """What returns the share of the mask once the device has counted it, None before."""
    pairs = mask.numel()
    with torch.cuda.device(mask.device):
        count = torch.full((), NOT_YET, dtype=torch.int64, device="cpu", pin_memory=True)
        count.copy_(mask.sum(), non_blocking=True)  # seen in memory: capture forbids to ask events

    def arrived() -> float | None:
        found = int(count)
        return None if found == NOT_YET else found / pairs

    return arrived


def _table() -> dict[Key, Costs]:
    global _costs
    if _costs is None:
        try:
            _costs = measured.read(measured.cache_file())
        except OSError as error:  # a home that is not there, or not to be looked into
            warnings.warn(
                f"measured costs of layers cannot be looked for, those that came with sadmoe are used: {error}; "
                "set XDG_CACHE_HOME to a folder that can be read",
                stacklevel=2,
            )
            _costs = {}
    return _costs


def _measured(layer: LayerShape, device: torch.device, dtype: torch.dtype) -> Costs | None:
    return _table().get((device_name(device), dtype_name(dtype), layer))


@lru_cache(maxsize=256)
def _nearest_built_in(layer: LayerShape, dtype: torch.dtype, alike: bool = False) -> Costs | None:
    """Of the measurements that came with sadmoe for these kernels those of the likest shape; None where there are none.

    Kernels without any go by those of ELSEWHERE, but not in 16 bits, nor where they must be alike: the units of other
    processors are other ones.
    """

    def unlike(row: Costs) -> float:
        sizes = [(each.d, each.neurons, each.expert_size, each.inputs) for each in (layer, row.layer)]
        return sum(abs(math.log(a / b)) for a, b in zip(*sizes, strict=True))

    came = [row for row in measured.read(measured.BUILT_IN).values() if row.dtype == dtype_name(dtype)]
    rows = [row for row in came if row.device == kernels_name()]
    if not rows and not alike and dtype.itemsize > 2:
        rows = [row for row in came if row.device == ELSEWHERE]
    if alike:
        rows = [row for row in rows if unlike(row) <= ALIKE]
    return min(rows, key=unlike, default=None)
