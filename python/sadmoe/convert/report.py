"""What a conversion made of each layer, as values, a table and JSON."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sadmoe.tables import format_table, to_json


@dataclass(frozen=True)
class LayerReport:
    """One converted layer. share and error are at the model's tau, on inputs from the dense model."""

    name: str
    d: int
    f: int
    d_out: int
    experts: int
    expert_size: int
    act: str
    gated: bool
    r2: float  # of the router, on tokens it was not trained on; nan where all norms are equal
    share: float  # of the (token, expert) pairs that are executed
    error: float  # |y - y_dense| / |y_dense|, L2 over all tokens together

    @property
    def weights(self) -> int:
        """Elements of the FFN's matrices, by which averages over layers are weighted."""
        return self.f * (self.d * (2 if self.gated else 1) + self.d_out)


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_` did: a row for each layer, the final tau, seconds of each step. Prints as a table."""

    layers: tuple[LayerReport, ...]
    tau: float
    budget: float | None  # that tau was solved for
    tokens: int  # inputs that a router was made from, of the layer with most
    seconds: dict[str, float]

    @property
    def share(self) -> float:
        """Executed share of all layers together."""
        return self._mean(lambda row: row.share)

    @property
    def r2(self) -> float:
        """Mean R² of the routers, of those that have one."""
        return self._mean(lambda row: row.r2)

    @property
    def error(self) -> float:
        """The largest relative error of a layer."""
        return max(row.error for row in self.layers)

    def __str__(self) -> str:
        header = ("layer", "d", "f", "E x s", "act", "router R²", "share", "error")
        total = (
            "all, worst error",
            "",
            "",
            "",
            "",
            f"{self.r2:.3f}",
            f"{self.share:.1%}",
            f"{self.error:.1e}",
        )
        table = format_table(header, [*map(_cells, self.layers), total])
        budget = (
            ""
            if self.budget is None
            else f", solved for {self.budget:.1%} of the converted layers' dense FLOPs"
        )
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        poor, of = sum(row.r2 < 0 for row in self.layers), len(self.layers)
        why = "predict worse than a mean would (R² below 0): give more data, or train them longer"
        told = f"\nthe routers of {poor} of {of} layers {why}" if poor else ""
        return f"{table}\ntau {self.tau:.4g}{budget}; {self.tokens} tokens; {steps}{told}"

    def to_json(self) -> str:
        """All fields and the totals, as JSON; a number that is not finite becomes null."""
        totals = {"share": self.share, "r2": self.r2, "error": self.error}
        return to_json(asdict(self) | totals, indent=2)

    def _mean(self, value: Callable[[LayerReport], float]) -> float:
        known = [(value(row), row.weights) for row in self.layers if math.isfinite(value(row))]
        return sum(v * w for v, w in known) / sum(w for _, w in known) if known else math.nan


def _cells(row: LayerReport) -> tuple[str, ...]:
    return (
        row.name,
        str(row.d),
        str(row.f),
        f"{row.experts} x {row.expert_size}",
        f"{row.act} GLU" if row.gated else row.act,
        f"{row.r2:.3f}",
        f"{row.share:.1%}",
        f"{row.error:.1e}",
    )
