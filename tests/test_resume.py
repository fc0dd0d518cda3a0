"""Long steps that are killed and go on, and steps that several processes share."""

import copy
import functools
import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import sadmoe
import torch
from clock import Clock
from processes import run_together
from sadmoe import Checkpoint, ConvertConfig, FinetuneConfig, RouterConfig, SparsifyConfig
from sadmoe.training import resume
from safetensors import safe_open
from states import same, state
from tiny_models import TINY, tokens
from torch import Tensor, nn

STEPS = 6


def batches(n: int = 5) -> list[dict[str, Tensor]]:
    ids = (torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(n))
    return [tokens() | {"input_ids": one} for one in ids]


def converted() -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same converted."""
    return copy.deepcopy(converted_once())


@functools.cache
def converted_once() -> tuple[nn.Module, nn.Module]:
    dense = TINY["bert"].model()
    model = copy.deepcopy(dense)
    config = ConvertConfig(experts=6, tau=0.2, router=RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, batches(), config, progress=False)
    return dense, model


def sparsify(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = SparsifyConfig(
        steps=STEPS, objective="task", lr=1e-3, seed=3
    )  # dropout is on: random state counts
    return sadmoe.sparsify_(
        model, data or batches(), config, loss=mean_square, checkpoint=checkpoint, progress=False
    )


def finetune(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = FinetuneConfig(steps=STEPS, lr=1e-3)
    return sadmoe.finetune_(
        model, data or batches(), config, teacher=dense, checkpoint=checkpoint, progress=False
    )


def finetune_layers(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = FinetuneConfig(steps=STEPS // 2, lr=1e-3)
    return sadmoe.finetune_layers_(
        model, data or batches(), config, teacher=dense, batch_tokens=8, checkpoint=checkpoint, progress=False
    )


def fit_routers(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = RouterConfig(steps=4, width=4)
    return sadmoe.fit_routers_(model, data or batches(), config, checkpoint=checkpoint)


def replace_projections(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = sadmoe.ProjectionConfig(steps=2)
    return sadmoe.replace_projections_(
        model, data or batches(), config, checkpoint=checkpoint, progress=False
    )


def convert(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = ConvertConfig(experts=6, tau=0.2, cluster="activity", router=RouterConfig(steps=4, width=4))
    return sadmoe.convert_(model, data or batches(), config, checkpoint=checkpoint, progress=False)


def mean_square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state.square().mean()


def start(step) -> tuple[nn.Module, nn.Module]:
    dense, model = converted()
    return (
        (copy.deepcopy(dense), dense) if step in (sparsify, replace_projections, convert) else (model, dense)
    )


class Killed(Exception):
    """Stands for whatever ends a run."""


class KilledAt(list):
    """Batches that end the run when they are asked for one the n-th time."""

    def __init__(self, values: list, n: int):
        super().__init__(values)
        self.left = n

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(i)


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


TRAINS = {
    finetune_layers: "layerwise.train",
    replace_projections: "attention.train",
    fit_routers: "routers.fit_router_",
    convert: "convert.build.fit_router_",
}
ALL = [sparsify, finetune, finetune_layers, fit_routers, replace_projections, convert]


@pytest.mark.parametrize("step", ALL)
def test_a_run_that_had_ended_is_loaded(step, tmp_path, monkeypatch):
    first, dense = start(step)
    step(first, dense, Checkpoint(tmp_path))
    second, dense = start(step)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was run again"))
    step(second, dense, Checkpoint(tmp_path))
    assert same(state(first), state(second))


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
    sparsify(model, dense, Checkpoint(tmp_path, every=every))
    assert len(made) == saves


def test_a_folder_of_another_run_is_refused_and_says_what_differs(tmp_path):
    model, dense = start(sparsify)
    sparsify(model, dense, Checkpoint(tmp_path))
    other = copy.deepcopy(dense)
    config = SparsifyConfig(steps=STEPS, objective="task", lr=2e-3, seed=3)
    with pytest.raises(
        ValueError, match=r"is of another run: config.lr was 0.001, is 0.002.* or an empty folder"
    ):
        sadmoe.sparsify_(
            other, batches(), config, loss=mean_square, checkpoint=Checkpoint(tmp_path), progress=False
        )
    with pytest.raises(ValueError, match="is of another run: the weights it began with were others"):
        sparsify(model, dense, Checkpoint(tmp_path))  # no longer the model that it began with


def test_a_run_by_the_gates_is_of_their_settings(tmp_path):
    dense, model = converted()
    config = FinetuneConfig(steps=2, tau=None)
    for tau, refused in ((0.1, False), (0.9, True), (0.1, False)):
        one = copy.deepcopy(model)
        sadmoe.set_tau(one, tau)
        with (
            pytest.raises(ValueError, match=r"of another run: config.gates.*tau=0.1")
            if refused
            else nullcontext()
        ):
            sadmoe.finetune_(
                one, batches(), config, teacher=dense, checkpoint=Checkpoint(tmp_path), progress=False
            )


def test_what_is_not_of_the_loop_is_of_the_run_too(tmp_path):
    def relu_or_gelu(act: str) -> None:
        config = sadmoe.ProjectionConfig(act=act, steps=2, max_tokens=50)
        model, folder = TINY["bert"].model(), Checkpoint(tmp_path / "projections")
        sadmoe.replace_projections_(model, batches(), config, checkpoint=folder, progress=False)

    relu_or_gelu("relu")
    with pytest.raises(ValueError, match=r"is of another run: config\.act was relu, is gelu"):
        relu_or_gelu("gelu")

    config = SparsifyConfig(steps=1, lr=1e-3)
    for only, frozen in (("0", False), ("1", False), ("0", True)):
        model = TINY["bert"].model().requires_grad_(False)
        model.encoder.layer.requires_grad_(True)
        if frozen:
            model.embeddings.word_embeddings.weight.data.add_(1.0)
        train = partial(
            sadmoe.sparsify_, model, batches(), config, filter=lambda name, only=only: f"layer.{only}." in name,
            checkpoint=Checkpoint(tmp_path), progress=False,
        )  # fmt: skip
        if (only, frozen) == ("0", False):
            train()
            continue
        what = "the weights it began with were others" if frozen else r"config.ffns was \['encoder.layer.0"
        with pytest.raises(ValueError, match=f"is of another run: {what}"):
            train()


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


def test_a_damaged_file_is_refused(tmp_path):
    model, dense = start(sparsify)
    sparsify(copy.deepcopy(model), dense, Checkpoint(tmp_path))
    path = tmp_path / "sparsify.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is no saved run of sadmoe, or is damaged"):
        sparsify(model, dense, Checkpoint(tmp_path))


def test_it_holds_no_pickle_and_its_state_is_json(tmp_path):
    model, dense = start(finetune)
    finetune(model, dense, Checkpoint(tmp_path))
    with safe_open(tmp_path / "finetune.safetensors", "pt") as file:
        header = json.loads(file.metadata()["sadmoe run"])
    assert len(header["state"]["history"]) == STEPS
    assert set(header["state"]["memory"]) == {"share"}


def test_every_is_checked():
    with pytest.raises(ValueError, match="every must be at least 0 seconds, got -1"):
        Checkpoint("folder", every=-1)


KILLED = """
    import json, os, signal, sys
    import test_resume, torch
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
        step = getattr(test_resume, name)
        model, dense = test_resume.start(step)
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


# ---------------------------------------------------------------- several processes


WORKER = """
    import sys
    import test_resume, torch
    from pathlib import Path
    from safetensors.torch import save_file

    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    store = f"file://{sys.argv[2]}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, model in test_resume.shared(spoil=rank == 1).items():
        save_file(test_resume.state(model), f"{sys.argv[2]}/{name}.{rank}.safetensors")
    with test_resume.pytest.raises(RuntimeError, match="found a run of [02] updates, and others not"):
        test_resume.killed_and_gone_on(Path(sys.argv[2]) / f"own {rank}")
    model = test_resume.killed_and_gone_on(Path(sys.argv[2]) / "kept")
    save_file(test_resume.state(model), f"{sys.argv[2]}/resumed.{rank}.safetensors")
    torch.distributed.destroy_process_group()
"""
SHARED = {"steps": 4, "lr": 1e-3, "accumulate": 2}


def killed_and_gone_on(folder: Path) -> nn.Module:
    """As `shared` sparsifies, but killed after two updates and begun again, and at last only loaded."""
    config, checkpoint = SparsifyConfig(**SHARED), Checkpoint(folder, every=0.0)
    for data in (KilledAt(batches(), 4), batches(), None):
        if data is None:
            torch.optim.AdamW.step = lambda *_: pytest.fail("it was run again")  # in a process of its own
            data = batches()
        model = copy.deepcopy(converted()[0])
        with suppress(Killed):
            sadmoe.sparsify_(model, data, config, checkpoint=checkpoint, progress=False)
        torch.distributed.barrier()  # as processes that begin anew: what the first one wrote is there
    return model


def shared(spoil: bool = False) -> dict[str, nn.Module]:
    """What two processes train together, each update from two batches. spoil: start from other weights, as the first
    process's must win."""
    dense, model = converted()
    sparse = copy.deepcopy(dense)
    if spoil:
        for one in (sparse, model):
            next(one.parameters()).data.add_(1.0)
    settings = dict(SHARED)
    sadmoe.sparsify_(sparse, batches(), SparsifyConfig(**settings), progress=False)  # its own teacher
    config = FinetuneConfig(**settings, share=0.01)  # so low that the penalty never rests
    sadmoe.finetune_(model, batches(), config, teacher=dense, progress=False)
    layered = copy.deepcopy(model)
    sadmoe.finetune_layers_(layered, batches(), config, teacher=dense, batch_tokens=8, progress=False)
    dropped, settings["objective"] = copy.deepcopy(dense).train(), "task"  # with dropout

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (
            model(**batch).last_hidden_state[..., :5].square().mean()
        )  # of all it would be that of a norm, a constant

    sadmoe.sparsify_(dropped, batches(), SparsifyConfig(**settings), loss=loss, progress=False)
    return {"sparsify": sparse, "finetune": model, "layers": layered, "dropped": dropped}


def assert_close_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To rounding, of which AdamW makes more. Attention does not feel the bias of the keys: its gradient is nothing
    but rounding, and so is where AdamW takes it."""
    assert a.keys() == b.keys()
    for key in a:
        if not key.endswith("key.bias"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_two_processes_do_what_one_does(tmp_path):
    from safetensors.torch import load_file

    assert run_together(WORKER, 2, str(tmp_path)) == [0, 0]
    kept = [load_file(tmp_path / f"{name}.0.safetensors") for name in ("sparsify", "resumed")]
    assert same(*kept)
    assert same(kept[1], load_file(tmp_path / "resumed.1.safetensors"))
    for name, model in shared().items():
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2))
        assert same(first, second)
        start_of = dict(converted()[name not in ("sparsify", "dropped")].state_dict())
        moved = [key for key in first if not torch.equal(first[key], start_of[key])]
        assert len(moved) > 20
        still = [key for key in first if "pooler" in key]  # which no hidden state depends on
        assert still
        assert not set(still) & set(moved)
        assert_close_states(first, state(model))


def test_accumulation_is_one_large_batch():
    dense, _ = converted()
    both = {key: torch.cat([batch[key] for batch in batches(2)]) for key in batches()[0]}
    models = [copy.deepcopy(dense) for _ in range(2)]
    for model, data, accumulate in zip(models, (batches(2), [both]), (2, 1), strict=True):
        config = SparsifyConfig(steps=3, objective="task", lr=1e-3, accumulate=accumulate, alpha=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        sadmoe.sparsify_(model, data, config, loss=mean_square, progress=False)
    assert_close_states(*(state(model) for model in models))


def test_files_of_earlier_and_later_versions_say_what_to_do(tmp_path):

    for version, advice in (
        (resume.FORMAT - 1, "begin anew in an empty folder"),
        (resume.FORMAT + 1, "update sadmoe"),
    ):
        header = {"format": version, "run": {}, "state": {}}
        sadmoe.files.write(tmp_path / "run.safetensors", {"w": torch.zeros(1)}, resume.KEY, header)
        with pytest.raises(
            ValueError, match=f"has format {version}, this sadmoe reads {resume.FORMAT}: {advice}"
        ):
            resume.read(tmp_path / "run.safetensors", {})


def test_projections_are_replaced_in_one_process(monkeypatch):
    monkeypatch.setattr("sadmoe.attention.place", lambda: (0, 2))
    dense, _ = converted()
    with pytest.raises(RuntimeError, match="trains in one process, and was called in a group of 2"):
        replace_projections(dense, dense, None)


def test_accumulate_must_suit_the_processes(monkeypatch):
    monkeypatch.setattr("sadmoe.training.processes.place", lambda: (0, 2))
    monkeypatch.setattr("sadmoe.training.processes.as_first_", lambda tensors: None)
    dense, _ = converted()
    with pytest.raises(ValueError, match=r"accumulate must be a multiple of the 2 processes .* got 3"):
        sadmoe.sparsify_(dense, batches(), SparsifyConfig(steps=1, accumulate=3), progress=False)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        SparsifyConfig(steps=1, accumulate=0)
