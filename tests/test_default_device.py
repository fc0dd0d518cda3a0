"""torch.set_default_device says where the user's tensors are made, not where ours are."""

import pytest
import sadmoe
import torch
from torch import nn
from two_ffns import data, two_ffns

ROUTER = sadmoe.RouterConfig(steps=2, width=2)


def adam_stays_at_home():
    """Whether torch's own optimizer counts its steps on the CPU, whatever the default device; older ones do not."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    with torch.device("meta"):
        try:
            torch.optim.Adam([weight]).step()
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_routers_are_trained_in_float32_whatever_the_default_dtype(dtype):
    batches, found = data(), []
    for default in (torch.float32, dtype):
        model = two_ffns(nn.ReLU)
        torch.set_default_dtype(default)
        try:
            sadmoe.convert_(
                model, batches, sadmoe.ConvertConfig(experts=6, tau=0.1, router=ROUTER), progress=False
            )
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([p for layer in sadmoe.moe_layers(model).values() for p in layer.router.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("cluster", ["weights", "activity"])
def test_another_default_device_is_no_hindrance(cluster):
    if not adam_stays_at_home():
        pytest.skip("this torch's Adam is hindered itself")
    config = sadmoe.ConvertConfig(experts=6, cluster=cluster, budget=0.8, router=ROUTER)
    batches, outputs = data(), []
    for device in ("cpu", "meta"):
        model, teacher = two_ffns(nn.GELU), two_ffns(nn.GELU)
        with torch.device(device):
            sadmoe.sparsify_(model, batches, sadmoe.SparsifyConfig(steps=2), progress=False)
            sadmoe.convert_(model, batches, config, progress=False)
            for tau in (0.2, None):
                config_of_run = sadmoe.FinetuneConfig(steps=2, tau=tau)
                sadmoe.finetune_(model, batches, config_of_run, teacher=teacher, progress=False)
            sadmoe.fit_routers_(model, batches, ROUTER, progress=False)
        outputs.append(model(batches[0]))
    assert torch.equal(*outputs)
