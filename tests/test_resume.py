"""Long steps that are killed and go on, and steps that several processes share."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import sadmoe
import torch
from clock import Clock
from long_steps import (
    ALL,
    STEPS,
    TRAINS,
    Killed,
    KilledAt,
    batches,
    convert,
    converted,
    finetune,
    finetune_layers,
    fit_routers,
    mean_square,
    replace_projections,
    sparsify,
    start,
)
from sadmoe import Checkpoint, ConvertConfig, FinetuneConfig, RouterConfig, SparsifyConfig
from sadmoe.training import loop, resume
from safetensors import safe_open
from states import same, state
from torch import Tensor, nn


@pytest.fixture
def updates(monkeypatch):
    """A list that gets longer with every update of weights."""
    made, update = [], torch.optim.AdamW.step

    def counted(self, *args, **kw):
        made.append(1)
        return update(self, *args, **kw)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return made


@pytest.mark.parametrize("step", [sparsify, finetune])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(step, tmp_path, updates):
    uninterrupted, dense = start(step)
    whole = step(uninterrupted, dense, None)
    for killed_at in (2, STEPS - 1):
        model, dense = start(step)
        before, folder = state(model), Checkpoint(tmp_path / str(killed_at), every=0.0)
        with pytest.raises(Killed):
            step(model, dense, folder, KilledAt(batches(), killed_at))
        assert same(state(model), before)
        updates.clear()
        report = step(model, dense, folder)
        assert len(updates) == STEPS - killed_at
        assert report.history == whole.history
        assert same(state(model), state(uninterrupted))


@pytest.mark.parametrize("step", [fit_routers, finetune])
def test_what_has_no_bits_here_does_not_hinder_a_run(step, tmp_path, updates):
    made = []
    for _ in range(2):
        model, dense = start(step)
        model.offloaded = nn.Linear(4, 4, device="meta").requires_grad_(
            False
        )  # as a part that lies on a disk
        updates.clear()
        step(model, dense, Checkpoint(tmp_path, every=0.0))
        made.append(len(updates))
    assert made[0] > made[1] == 0  # the second was loaded


class Shuffled:
    """Batches in an order that torch's own random numbers say, and after `left` of them the end of the run."""

    def __init__(self, left: int = 10**6):
        self.loader = torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True)
        self.left, self.seen = left, []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if len(self.seen) == self.left:
                raise Killed
            self.seen.append(batch["input_ids"].sum().item())
            yield batch


def test_shuffled_batches_come_again_as_they_came(tmp_path):
    whole, data = start(sparsify)[0], Shuffled()
    config = SparsifyConfig(
        steps=13, objective="task", lr=1e-3
    )  # with dropout, which draws between the batches

    def run(model: nn.Module, data: Shuffled) -> None:
        sadmoe.sparsify_(
            model, data, config, loss=mean_square, progress=False, checkpoint=Checkpoint(tmp_path, every=0.0)
        )

    torch.manual_seed(1)
    sadmoe.sparsify_(whole, data, config, loss=mean_square, progress=False)
    seen = data.seen[5:]  # the first five tell how sparse the model is
    assert len(seen) == 13
    epochs = [seen[:5], seen[5:10]]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    model, again = start(sparsify)[0], Shuffled()
    with pytest.raises(Killed):
        run(model, Shuffled(left=5 + 8))
    torch.manual_seed(2)
    run(model, again)
    assert again.seen[5:] == seen
    assert same(state(model), state(whole))


@pytest.mark.parametrize("step", [finetune_layers, fit_routers, replace_projections, convert])
def test_layers_that_were_done_are_not_done_again(step, tmp_path, monkeypatch, updates):
    uninterrupted, dense = start(step)
    updates.clear()
    step(uninterrupted, dense, None)
    of_all = len(updates)
    model, dense = start(step)
    name = f"sadmoe.{TRAINS[step]}"
    real, calls = vars(sys.modules[name.rpartition(".")[0]])[name.rpartition(".")[2]], []

    def counted(*args, **kw):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return real(*args, **kw)

    updates.clear()
    with monkeypatch.context() as patch:
        patch.setattr(name, counted)
        with pytest.raises(Killed):
            step(model, dense, Checkpoint(tmp_path))
    of_one = len(updates)
    assert 0 < of_one < of_all
    assert len(list(tmp_path.iterdir())) == 1
    updates.clear()
    step(model, dense, Checkpoint(tmp_path))
    assert len(updates) == of_all - of_one
    assert same(state(model), state(uninterrupted))
    files = list(tmp_path.iterdir())
    assert len(files) > 1
    assert all(".tmp" not in path.name for path in files)


class Counted(Sequence):
    """Batches that are made when they are asked for, as those of images are."""

    same_again = True

    def __init__(self, left: int = 10**6):
        self.left, self.read = left, []

    def __len__(self):
        return 5

    def __getitem__(self, i):
        if len(self.read) == self.left:
            raise Killed
        self.read.append(i)
        return batches()[i]


@pytest.mark.parametrize("done", [4, STEPS])
def test_batches_of_updates_that_were_done_are_not_read_again(done, tmp_path):
    def run(data: Counted, folder: str) -> list[int]:
        model, dense = start(finetune)
        finetune(model, dense, Checkpoint(tmp_path / folder, every=0.0), data)
        return data.read

    whole = run(Counted(), "whole")
    first = len(whole) - STEPS  # read before the updates
    with pytest.raises(Killed) if done < STEPS else nullcontext():
        run(Counted(left=first + done), "killed")
    assert run(Counted(), "killed") == whole[:first] + whole[first + done :]


class Drawing(Counted):
    """Batches that draw random numbers, as images that are cropped at random do."""

    def __getitem__(self, i):
        batch = super().__getitem__(i)
        self.read[-1] = (i, torch.rand(()).item())
        return batch


def test_batches_that_draw_random_numbers_come_again_as_they_came(tmp_path):
    def run(data: Drawing, folder: str) -> list[tuple[int, float]]:
        model, dense = start(finetune)
        finetune(model, dense, Checkpoint(tmp_path / folder, every=0.0), data)
        return data.read

    whole = run(Drawing(), "whole")
    with pytest.raises(Killed):
        run(Drawing(left=len(whole) - 2), "killed")
    assert run(Drawing(), "killed")[-2:] == whole[-2:]


def test_a_conversion_that_is_loaded_says_what_the_first_one_did(tmp_path):
    model, dense = start(convert)
    rows = convert(copy.deepcopy(model), dense, Checkpoint(tmp_path)).layers
    again = convert(copy.deepcopy(model), dense, Checkpoint(tmp_path))
    assert again.layers == rows
    assert str(again)
    other = ConvertConfig(experts=6, tau=0.2, cluster="weights", router=RouterConfig(steps=4, width=4))
    with pytest.raises(ValueError, match="is of another run: cluster was activity, is weights"):
        sadmoe.convert_(model, batches(), other, checkpoint=Checkpoint(tmp_path), progress=False)
    assert not sadmoe.moe_layers(model)


@pytest.mark.parametrize(
    ("step", "config"), [(sadmoe.sparsify_, SparsifyConfig), (sadmoe.finetune_, FinetuneConfig)]
)
def test_a_killed_run_goes_on_with_less_memory(step, config, tmp_path, updates):
    model, dense = start(finetune if config is FinetuneConfig else sparsify)
    kw = {"teacher": dense, "checkpoint": Checkpoint(tmp_path, every=0.0), "progress": False}
    with pytest.raises(Killed):
        step(model, KilledAt(batches(), 2), config(steps=STEPS), **kw)
    updates.clear()
    step(model, batches(), config(steps=STEPS, kept_bytes=0), **kw)
    assert len(updates) == STEPS - 2


def test_seconds_go_on_where_they_were(tmp_path, monkeypatch):
    dense, _ = converted()
    config = SparsifyConfig(seconds=40.0, lr=1e-3)

    def run(model: nn.Module, checkpoint: Checkpoint | None, data: list) -> sadmoe.SparsifyReport:
        monkeypatch.setattr("sadmoe.training.loop.time", Clock(1.0))
        return sadmoe.sparsify_(model, data, config, checkpoint=checkpoint, progress=False)

    whole = run(copy.deepcopy(dense), Checkpoint(tmp_path / "whole", every=0.0), batches())
    folder = Checkpoint(tmp_path / "killed", every=0.0)
    with pytest.raises(Killed):
        run(copy.deepcopy(dense), folder, KilledAt(batches(), len(whole.history) // 2))
    again = run(copy.deepcopy(dense), folder, batches())
    assert abs(len(again.history) - len(whole.history)) <= 1
    assert again.history[: len(whole.history) // 2] == whole.history[: len(whole.history) // 2]


@pytest.mark.parametrize(("every", "saves"), [(0.0, STEPS + 1), (25.0, 3), (1e9, 1)])
def test_it_saves_no_more_often_than_asked(every, saves, tmp_path, monkeypatch):
    made, write = [], resume.write
    monkeypatch.setattr(resume, "time", Clock(10.0))
    monkeypatch.setattr(resume, "write", lambda *args: made.append(1) or write(*args))
    model, dense = start(sparsify)
    told, as_tuple = [], loop.astuple
    monkeypatch.setattr(loop, "astuple", lambda step: told.append(1) or as_tuple(step))
    sparsify(model, dense, Checkpoint(tmp_path, every=every))
    assert len(made) == saves
    assert len(told) <= saves * STEPS, "nor is the history told more often"
    assert saves > 1 or len(told) == STEPS


def test_moments_come_back_in_the_order_of_their_weights(tmp_path):
    """A fused AdamW goes through memory, whatever a tensor calls its dimensions."""

    def begun():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return (
            model,
            optimizer,
            resume.Saver(resume.Kept(Checkpoint(tmp_path), "conv", {}), model, optimizer, None),
        )

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    model, optimizer, saver = begun()
    step(model, optimizer, x)
    saver.save(dict, last=True)
    again, its_optimizer, its_saver = begun()
    assert its_saver.resume() is not None
    for each in ((model, optimizer), (again, its_optimizer)):
        step(*each, x)
    assert torch.equal(model.weight, again.weight)


class Growing(nn.Module):
    """A table that grows with what it is run on, as of M2M100."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ffn = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
        self.register_buffer("table", torch.zeros(1, 2, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.table.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]
        return x + self.ffn(x + self.table[:, : x.shape[1]])


def test_a_buffer_that_a_forward_makes_is_left_to_it(tmp_path):
    def run() -> nn.Module:
        model = Growing().eval()
        config = SparsifyConfig(steps=2, lr=1e-3)
        sadmoe.sparsify_(
            model, [torch.ones(2, 5, 24)], config, checkpoint=Checkpoint(tmp_path), progress=False
        )
        return model

    assert same(state(run()), state(run()))


KILLED = """
    import json, os, signal, sys
    import long_steps, torch
    from sadmoe import Checkpoint, files

    torch.set_num_threads(1)
    write = files.write

    def run(name, writes):
        written = []

        def write_and_die(*args):
            write(*args)
            written.append(1)
            if len(written) == writes:
                os.kill(os.getpid(), signal.SIGKILL)

        files.write = write_and_die
        step = getattr(long_steps, name)
        model, dense = long_steps.start(step)
        step(model, dense, Checkpoint(name, every=0.0))

    for name, writes in json.loads(sys.argv[1]).items():
        if os.fork() == 0:  # what was imported, once for all
            run(name, writes)
            os._exit(0)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (name, status)
"""


def test_a_kill_dash_nine_loses_at_most_an_interval(tmp_path):
    """Of fit_routers_ the router of a layer, which is trained in seconds; of convert_ a layer."""
    writes = dict(zip(ALL, (3, 3, 2, 1, 1, 1), strict=True))
    names = json.dumps({step.__name__: count for step, count in writes.items()})
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), names],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=300,
        check=True,
    )
    for step, count in writes.items():
        folder = tmp_path / step.__name__
        (saved,) = folder.iterdir()
        with safe_open(saved, "pt") as file:
            history = json.loads(file.metadata()["sadmoe run"])["state"].get("history", [])
        assert len(history) == (0 if step in (fit_routers, convert) else count)
        model, dense = start(step)
        uninterrupted = copy.deepcopy(model)
        step(model, dense, Checkpoint(folder))
        step(uninterrupted, dense, None)
        assert same(state(model), state(uninterrupted)), step.__name__


@pytest.mark.parametrize("step", ALL)
def test_what_had_ended_is_only_loaded(step, tmp_path, monkeypatch):
    model, dense = start(step)
    step(model, dense, Checkpoint(tmp_path))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was run again"))
    monkeypatch.setattr("sadmoe.files.write", lambda *args: pytest.fail("it was saved again"))
    again, dense = start(step)
    step(again, dense, Checkpoint(tmp_path))
    assert same(state(again), state(model))


def test_what_a_kill_left_half_written_is_gone_after_the_next_save(tmp_path):
    (tmp_path / ".sparsify.safetensors.tmp").write_bytes(b"half of a file")
    model, dense = start(sparsify)
    sparsify(model, dense, Checkpoint(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["sparsify.safetensors"]
