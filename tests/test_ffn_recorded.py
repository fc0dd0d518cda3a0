"""Blocks that a probe of hidden states cannot run: proved by the call that the model makes of them on a batch."""

import pytest
import torch
from sadmoe.adapter import load_adapter, save_adapter
from sadmoe.convert import restore_
from sadmoe.dial import set_tau
from sadmoe.ffn import find_ffns
from test_convert import convert, fingerprint
from tiny_models import call
from torch import nn


class Masked(nn.Module):
    """A block that no probe of hidden states can run: it asks for a mask, for whole windows, and notes its calls."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(24, 60), nn.GELU(), nn.Linear(60, 24)

    def forward(self, x, *, mask, cache):
        assert x.shape[1] % 7 == 0
        assert not cache, "called once"
        cache.append(x)
        return x + self.fc2(self.act(self.fc1(x))) * mask[..., None], cache


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Masked(), Masked()])

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x, mask=torch.ones_like(x[..., 0]), cache=[])
        return x


def test_a_block_that_takes_more_than_hidden_states_is_proved_by_a_batch(tmp_path):
    model, batches = Windows().eval(), [torch.randn(2, 14, 24)]
    with pytest.raises(NotImplementedError, match=r"it raised TypeError: Masked\.forward"):
        find_ffns(model)
    names = ["blocks.0.fc1", "blocks.1.fc1"]
    assert [site.name for site in find_ffns(model, batches=batches)] == names
    before, wanted = fingerprint(model), call(model, batches[0])
    report = convert(model, batches)
    assert [row.name for row in report.layers] == names
    torch.testing.assert_close(call(model, batches[0]), wanted)
    set_tau(model, 0.3)
    save_adapter(model, tmp_path / "a.safetensors")
    converted = call(model, batches[0])
    restore_(model)
    assert fingerprint(model)[0] == before[0]
    assert torch.equal(call(model, batches[0]), wanted)
    load_adapter(model, tmp_path / "a.safetensors")  # without a batch: the file says where
    assert torch.equal(call(model, batches[0]), converted)


def test_a_block_is_proved_by_the_first_batch_that_reaches_it():
    class Either(Windows):
        def forward(self, x):
            return super().forward(x) if x.shape[1] == 14 else x

    other = torch.randn(2, 3, 24)
    model, batches = Either().eval(), [other, other, torch.randn(2, 14, 24)]
    assert [site.name for site in find_ffns(model, batches=batches)] == ["blocks.0.fc1", "blocks.1.fc1"]
    with pytest.raises(NotImplementedError, match="missing 2 required keyword-only arguments"):
        find_ffns(model, batches=batches[:2])


def test_what_the_batch_disproves_is_refused():
    class Twice(Masked):
        def forward(self, x, *, mask, cache):
            return x + self.fc2(self.act(self.fc1(x)) * 2) * mask[..., None], cache

    model = Windows()
    model.blocks[1] = Twice()
    assert [site.name for site in find_ffns(model, batches=[torch.randn(2, 14, 24)])] == ["blocks.0.fc1"]
