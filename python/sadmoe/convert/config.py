"""What can be chosen about a conversion."""

from dataclasses import dataclass, field, replace
from typing import Literal

from sadmoe.checks import Filter, check_fields, check_range
from sadmoe.gates import DynamicK
from sadmoe.routers import RouterConfig
from sadmoe.tables import divisors

Cluster = Literal["weights", "activity"]
EXPERT_SIZE = 32  # neurons: the largest that still skips most of what a sparse FFN could skip


@dataclass(frozen=True)
class ConvertConfig:
    """How a dense model becomes a dynamic-k MoE. Of expert_size and experts give one, of budget and tau one.

    expert_size: s, neurons in an expert. 32 where neither it nor experts is given.
    experts: E, experts in each FFN: the other way to say it, for FFNs of several widths.
    budget: FLOPs of the converted layers, routers included, as a share of their dense FLOPs: tau is solved for it.
    tau: the threshold itself, in [0, 1]. 0 where neither it nor budget is given: every expert runs, nothing is saved.
    router: `RouterConfig`, size and training of the routers.
    max_tokens: inputs that each layer's router is trained on: 48 MiB a layer for d = 768 in float32.
    max_bytes: of inputs held together; the batches are run again for the layers beyond that.
    skip_padding: whether inputs at padding tokens are left out: nobody reads what is computed there.
    cluster: what makes neurons alike: "activity", counting for the same tokens (with ReLU firing for them, else adding
        about as much to the output), or "weights", their input weights, as in the paper, which kept less wherever both
        were tried.
    seed: of the sample of inputs, of the k-means, and of the order in which a DataLoader shuffles; the routers have
        their own in `router`.
    filter: of an FFN's name; False leaves it dense. None: convert all.
    projection_expert_size, projection_router: what differs for the MLPs of `replace_projections_`, which are narrower
        than FFNs: their routers should be too. None: as the FFNs.
    """

    expert_size: int | None = None
    experts: int | None = None
    budget: float | None = None
    tau: float | None = None
    router: RouterConfig = field(default_factory=RouterConfig)
    max_tokens: int = 16384
    max_bytes: int = 2**30
    skip_padding: bool = True
    cluster: Cluster = "activity"
    seed: int = 0
    filter: Filter | None = None
    projection_expert_size: int | None = None
    projection_router: RouterConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.expert_size is not None and self.experts is not None:
            raise ValueError(
                "ConvertConfig: give expert_size or experts, not both; "
                f"got {self.expert_size} and {self.experts}"
            )
        if self.budget is not None and self.tau is not None:
            raise ValueError(
                "ConvertConfig: give tau, or budget to have it solved; "
                f"got tau={self.tau} and budget={self.budget}"
            )
        sizes = ("expert_size", "experts", "projection_expert_size")
        check_range(self, *sizes, "max_bytes", least=1)
        check_range(self, "max_tokens", least=2)  # to hold some out
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(
                f"ConvertConfig: budget must be in (0, 1], a share of the dense FLOPs, got {self.budget}"
            )
        if self.tau is not None:
            DynamicK(self.tau)  # checks the range

    def of(self, adapter: str) -> "ConvertConfig":
        """The same for a site of that adapter: with what differs for projections in the place of the rest."""
        if adapter != "projection":
            return self
        size = self.projection_expert_size
        sizes = {} if size is None else {"expert_size": size, "experts": None}
        return replace(self, router=self.projection_router or self.router, **sizes)  # type: ignore[arg-type]

    @property
    def gate(self) -> DynamicK:
        """The gate that the layers start with."""
        return DynamicK(0.0 if self.tau is None else self.tau)

    def experts_of(self, f: int) -> int:
        """E for an FFN of f neurons. Raises ValueError, with what would do, where f does not split evenly."""
        if self.experts is not None:
            if f % self.experts:
                raise ValueError(
                    f"{f} neurons do not split into {self.experts} experts; these do: {divisors(f)}"
                )
            return self.experts
        size = EXPERT_SIZE if self.expert_size is None else self.expert_size
        if f % size:
            raise ValueError(
                f"{f} neurons do not split into experts of {size}; expert_size may be one of {divisors(f)}"
            )
        return f // size
