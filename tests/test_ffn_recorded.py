"""Blocks that a probe of hidden states cannot run: proved by the call that the model makes of them on a batch."""

import threading

import pytest
import torch
from conversions import convert
from sadmoe.adapter import load_adapter, save_adapter
from sadmoe.convert import restore_
from sadmoe.dial import set_tau
from sadmoe.ffn import find_ffns
from sites import assert_same_state, state
from tiny_models import F_, D, call
from torch import Tensor, nn


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
    before, wanted = state(model), call(model, batches[0])
    report = convert(model, batches)
    assert [row.name for row in report.layers] == names
    torch.testing.assert_close(call(model, batches[0]), wanted)
    set_tau(model, 0.3)
    save_adapter(model, tmp_path / "a.safetensors")
    converted = call(model, batches[0])
    restore_(model)
    assert_same_state(before, state(model))
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


class Halves(nn.Module):
    """Two modules in the way of BERT's: what is done between and around them is the block's own."""

    def __init__(self, **names):
        super().__init__()
        for name in names or {"": None}:
            setattr(self, f"{name}inter", nn.Sequential(nn.Linear(24, 60), nn.ReLU()))
            setattr(self, f"{name}out", nn.Sequential(nn.Linear(60, 24), nn.Dropout()))


class Around(nn.Module):
    """A model of one block, and how it calls it."""

    def __init__(self, block, call):
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x):
        return self.call(self.block, x)


def found(block, call, batch=None):
    batch = torch.randn(2, 7, 24) if batch is None else batch
    return [site.name for site in find_ffns(Around(block, call).eval(), batches=[batch])]


def test_an_ffn_that_only_some_calls_run_is_proved_by_one_that_does():
    class TwoWays(Halves):
        def forward(self, x, queries=0):
            if not queries:
                return x + self.t_out(self.t_inter(x))
            first, rest = x[:, :queries], x[:, queries:]
            return torch.cat(
                [first + self.q_out(self.q_inter(first)), rest + self.t_out(self.t_inter(rest))], 1
            )

    assert found(TwoWays(t_=0, q_=0), lambda block, x: block(x, queries=3)) == [
        "block.t_inter",
        "block.q_inter",
    ]


def test_an_ffn_in_two_modules_that_the_model_never_runs_is_left_out(caplog):
    class OneWay(Halves):
        def forward(self, x):
            return x + self.t_out(self.t_inter(x))

    assert found(OneWay(t_=0, q_=0), lambda block, x: block(x)) == ["block.t_inter"]
    assert "block (OneWay): run on a probe [1, 8, 24], its q_inter.0 does not run" in caplog.text


def test_weights_that_are_not_finite_prove_nothing():
    model = nn.Sequential(nn.Sequential(nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 24)))
    nn.init.constant_(model[0][0].weight, torch.nan)
    with pytest.raises(NotImplementedError, match="nothing that it returns is finite"):
        find_ffns(model)


def test_an_ffn_that_no_call_runs_is_told_of_beside_one_that_is_found(caplog):
    class OneWay(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc1, self.fc2 = nn.ReLU(), nn.Linear(24, 60), nn.Linear(60, 24)
            self.other1, self.other2 = nn.Linear(24, 96), nn.Linear(96, 24)

        def forward(self, x):
            return x + self.fc2(self.act(self.fc1(x)))

    assert found(OneWay(), lambda block, x: block(x)) == ["block.fc1"]
    assert "block (OneWay): run on a probe [1, 8, 24], its other1 does not run" in caplog.text


def test_all_that_a_block_returns_is_compared():
    class Second(Halves):
        def forward(self, x, z, mask):
            return x, z + self.out(self.inter(z) ** 2 * mask)

    class Plain(Halves):
        def forward(self, x, z, mask):
            return {"x": x, "deeper": (z + self.out(self.inter(z)) * mask,)}

    def call(block, x):
        return block(x, x, torch.ones(1))

    with pytest.raises(NotImplementedError, match=r"does not compute down\(act\(up\(x\)\)\)"):
        found(Second(), call)
    assert found(Plain(), call) == ["block.inter"]


@pytest.mark.parametrize("squared", [False, True])
def test_a_block_whose_output_does_not_depend_on_the_ffn_proves_nothing(squared):
    class ReZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 24)
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            h = self.act(self.fc1(x))
            return x + self.scale * self.fc2(h**2 if squared else h)

    block = ReZero()
    with pytest.raises(NotImplementedError, match="nothing that it returned depends on its fc2"):
        found(block, lambda block, x: block(x))
    nn.init.ones_(block.scale)
    if squared:
        with pytest.raises(NotImplementedError, match=r"does not compute down\(act\(up\(x\)\)\)"):
            found(block, lambda block, x: block(x))
    else:
        assert found(block, lambda block, x: block(x)) == ["block.fc1"]


def test_rows_that_are_not_finite_are_left_out():
    class Attends(Halves):
        def forward(self, x, bias):
            a = (x @ x.mT + bias).softmax(-1) @ x
            return a + self.out(self.inter(a))

    bias = torch.zeros(2, 1, 7)
    bias[1] = -torch.inf
    assert found(Attends(), lambda block, x: block(x, bias)) == ["block.inter"]


def test_a_block_that_divides_by_what_the_ffn_gives_is_not_proved_by_that():
    class Divides(Halves):
        def forward(self, x):
            h = self.out(self.inter(x) ** 2)
            return torch.cat([x, h / h.abs().amax(-1, keepdim=True)])

    block = Divides()
    block.out[0].bias = None  # without the FFN it is 0 / 0
    with pytest.raises(
        NotImplementedError, match=r"does not compute down\(act\(up\(x\)\)\)|nothing that it returned"
    ):
        found(block, lambda block, x: block(x))


def test_a_block_may_write_to_what_the_ffn_gives():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(24, 60), nn.GELU(), nn.Linear(60, 24)

        def forward(self, x):
            h = self.fc2(self.act(self.fc1(x)))
            h += x
            return h

    assert found(Adds(), lambda block, x: block(x)) == ["block.fc1"]


def test_halves_alone_are_told_of_where_no_call_can_be_made_again(caplog):
    class Locked(Halves):
        def forward(self, x, mask, lock):
            with lock:
                return x + self.out(self.inter(x)) * mask

    lock = threading.Lock()  # which cannot be copied
    assert found(Locked(), lambda block, x: block(x, torch.ones(1), lock)) == ["block.inter"]
    assert "1 FFNs are proved by their two modules alone" in caplog.text
    assert "with the dense one: block.inter" in caplog.text


class Branches(nn.Module):
    """Two FFNs, one for texts and one for images, which share their activation."""

    def __init__(self, in_order: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, F_), nn.Linear(F_, D), nn.GELU()
        for name in ("fc3", "fc4") if in_order else ("fc4", "fc3"):
            self.register_module(name, nn.Linear(D, F_) if name == "fc3" else nn.Linear(F_, D))

    def forward(self, x: Tensor, image: bool = False) -> Tensor:
        up, down = (self.fc3, self.fc4) if image else (self.fc1, self.fc2)
        return x + down(self.act(up(x)))


class OfBranches(nn.Module):
    """kinds: True for images; of each batch the next, or of one batch all."""

    def __init__(self, in_order: bool) -> None:
        super().__init__()
        self.block = Branches(in_order)

    def forward(self, x: Tensor, kinds: list[bool]) -> Tensor:
        for image in kinds:
            x = self.block(x, image)
        return x


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    "batches", [[[False, True]], [[True, False]], [[False], [True]], [[True], [False], [False]]], ids=str
)
def test_ffns_that_share_an_activation_and_run_apart_are_refused(batches, in_order):
    model = OfBranches(in_order)
    x = torch.randn(2, 3, D)
    before, modules, wanted = state(model), dict(model.named_modules()), model(x, [True, False])
    with pytest.raises(NotImplementedError, match=r"its act may be that of fc3 too, which does not run"):
        find_ffns(model, batches=[{"x": x, "kinds": kinds} for kinds in batches])
    assert_same_state(before, state(model))
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(x, [True, False]), wanted)


def test_a_scripted_part_takes_no_hooks_of_calls_that_are_made_again():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.up, self.down = nn.ReLU(), nn.Linear(D, F_), nn.Linear(F_, D)

        def forward(self, x: Tensor, scale: dict[str, Tensor]) -> Tensor:
            return x + self.down(self.act(self.up(x))) * scale["by"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(D, D)))
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.scripted(x), {"by": torch.ones(())})

    assert [site.name for site in find_ffns(Model(), batches=[torch.randn(2, 3, D)])] == ["block.up"]
