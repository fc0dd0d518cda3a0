"""What a converted layer is to the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """The shape of a converted layer; bytes_each of its weights: 2 or 4."""

    d: int
    d_out: int
    experts: int
    expert_size: int
    router_width: int
    gated: bool = False
    bytes_each: int = 2

    @property
    def neurons(self) -> int:
        return self.experts * self.expert_size

    @property
    def inputs(self) -> int:
        """Products on the way in: 2 of a GLU."""
        return 2 if self.gated else 1

    @property
    def neuron_width(self) -> int:
        """Weights of a neuron."""
        return self.inputs * self.d + self.d_out

    @property
    def router_weights(self) -> int:
        return self.router_width * (self.d + self.experts)
