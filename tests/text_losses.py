"""Batches of text, and losses of what a model makes of them."""

import torch
import torch.nn.functional as F
from sadmoe.dial import tau
from tiny_models import call


def text_batches(n=3):
    generator = torch.Generator().manual_seed(8)
    mask = torch.ones(4, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    return [
        {"input_ids": torch.randint(3, 50, (4, 20), generator=generator), "attention_mask": mask}
        for _ in range(n)
    ]


def distance(model, batch):
    """A loss that is 1 at tau = 0 and grows as the output leaves that of the dense model."""
    return 1 + drift(model, batch)


def drift(model, batch):
    output = call(model, batch)
    with tau(model, 0.0):
        return F.mse_loss(output, call(model, batch))
