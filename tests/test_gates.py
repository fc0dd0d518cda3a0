"""Gates in a layer: those of sadmoe and those of a user."""

import pytest
import torch
from converted import random_layer, random_rows
from sadmoe.gates import DynamicK, TopK


@pytest.mark.parametrize("gate", [TopK(2), DynamicK(0.3, true_norms=True), DynamicK(0.3)], ids=str)
def test_a_layer_of_any_gate_is_exported_for_any_number_of_tokens(gate):
    layer = random_layer(gate=gate).eval()
    exported = torch.export.export(
        layer, (random_rows(7),), dynamic_shapes={"x": {0: torch.export.Dim("T")}}
    ).module()
    x = random_rows(12)
    torch.testing.assert_close(exported(x), layer(x))


class ExpertsFirst:
    """A gate of the user's, whose mask is turned."""

    true_norms = False

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores > scores.mean()).t().contiguous()


def test_a_gate_s_mask_of_another_shape_is_refused():
    layer, x = random_layer(gate=ExpertsFirst()), random_rows(6)
    with pytest.raises(ValueError, match=r"mask must be \[7, 8\], got \[8, 7\]"):
        layer(random_rows(7))
    layer.gate = type("Short", (ExpertsFirst,), {"mask": lambda self, scores: scores[:, 1:] > 0})()
    with pytest.raises(ValueError, match=r"mask must be \[6, 8\], got \[6, 7\]"):
        layer(x)
