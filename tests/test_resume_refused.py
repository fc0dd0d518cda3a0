"""Checkpoints that a run may not go on from."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import pytest
import sadmoe
import torch
from clock import Clock
from long_steps import (
    STEPS,
    batches,
    convert,
    converted,
    finetune,
    finetune_layers,
    mean_square,
    replace_projections,
    sparsify,
    start,
)
from sadmoe import Checkpoint, FinetuneConfig, RouterConfig, SparsifyConfig
from sadmoe.dial import converted_layers
from sadmoe.training import resume
from safetensors import safe_open
from tiny_models import TINY


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
    with pytest.raises(ValueError, match=r"is of another run: .*the bits of its weights were others"):
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


def test_steps_on_a_converted_model_are_of_its_activations(tmp_path):
    dense, model = converted()
    routers, experts = Checkpoint(tmp_path / "routers"), Checkpoint(tmp_path / "experts")
    one_by_one = Checkpoint(tmp_path / "one by one")
    for act in ("gelu", "relu"):
        one = copy.deepcopy(model)
        next(iter(converted_layers(one).values())).act = act
        refused = "is of another run: .*act"
        with pytest.raises(ValueError, match=refused) if act == "relu" else nullcontext():
            sadmoe.fit_routers_(one, batches(), RouterConfig(steps=2), checkpoint=routers, progress=False)
        with pytest.raises(ValueError, match=refused) if act == "relu" else nullcontext():
            config = FinetuneConfig(steps=2)
            sadmoe.finetune_(one, batches(), config, teacher=dense, checkpoint=experts, progress=False)
        with pytest.raises(ValueError, match=refused) if act == "relu" else nullcontext():
            finetune_layers(one, dense, one_by_one)


@pytest.mark.parametrize("step", [sparsify, replace_projections, convert])
def test_steps_on_a_dense_model_are_of_its_activations(step, tmp_path):
    folder = Checkpoint(tmp_path)
    for act in ("gelu", "silu"):
        model, dense = start(step)
        sadmoe.ffn.swap_activations_(model, sadmoe.find_ffns(model), act)
        with pytest.raises(ValueError, match=r"is of another run: .*act") if act == "silu" else nullcontext():
            step(model, dense, folder)


@pytest.mark.parametrize("begun", ["low_rank", "random"])
def test_a_projection_is_of_what_makes_its_inputs(begun, tmp_path):
    config, folder = sadmoe.ProjectionConfig(steps=2, start=begun), Checkpoint(tmp_path)
    for scale in (1.0, 1.5):
        model = TINY["bert"].model()
        model.embeddings.word_embeddings.weight.data.mul_(scale)
        with pytest.raises(ValueError, match="is of another run") if scale > 1 else nullcontext():
            sadmoe.replace_projections_(model, batches(), config, checkpoint=folder, progress=False)


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
        what = (
            "the bits of its weights were others"
            if frozen
            else r"config.acts.encoder.layer.0.*was gelu, is None"
        )
        with pytest.raises(ValueError, match=f"is of another run: {what}"):
            train()


def nothing(output, wanted, batch):
    return output.last_hidden_state.sum() * 0


@pytest.mark.parametrize("part", ["layer.1", "word_embeddings", "a buffer"])
@pytest.mark.parametrize("step", [finetune, finetune_layers, sparsify])
def test_a_run_towards_another_teacher_is_another(step, part, tmp_path):
    dense, model = converted()
    dense.register_buffer("factor", torch.ones(1))
    other = copy.deepcopy(dense)
    for name, p in other.named_parameters():
        p.data.mul_(1.5 if part in name else 1.0)
    other.factor.mul_(2.0 if part == "a buffer" else 1.0)

    def train(teacher):
        one = copy.deepcopy(dense if step is sparsify else model)
        if step is sparsify:
            config, folder = SparsifyConfig(steps=1), Checkpoint(tmp_path)
            sadmoe.sparsify_(one, batches(), config, teacher=teacher, checkpoint=folder, progress=False)
        else:
            step(one, teacher, Checkpoint(tmp_path))

    train(dense)
    train(copy.deepcopy(dense))
    with pytest.raises(ValueError, match="of another run: the bits of its teacher were others"):
        train(other)


def test_a_run_with_another_loss_is_another(tmp_path):
    dense, model = converted()
    config = FinetuneConfig(steps=1)

    def train(**held_to):
        sadmoe.finetune_(
            copy.deepcopy(model),
            batches(),
            config,
            checkpoint=Checkpoint(tmp_path),
            progress=False,
            **held_to,
        )

    train(teacher=dense)
    for held_to, told in (
        ({"teacher": dense, "output_loss": nothing}, "config.output_loss was None, is nothing"),
        ({"loss": mean_square}, "config.loss was None, is mean_square, it had a teacher"),
    ):
        with pytest.raises(ValueError, match=f"of another run: {told}"):
            train(**held_to)


def test_a_run_that_trained_more_or_less_is_another(tmp_path):
    def train(model):
        config = sadmoe.SparsifyConfig(steps=1)
        sadmoe.sparsify_(model, batches(), config, checkpoint=Checkpoint(tmp_path), progress=False)

    train(TINY["bert"].model())
    model = TINY["bert"].model()
    model.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is of another run: trained differs by embeddings\."):
        train(model)
    kept = resume.Kept(Checkpoint(tmp_path), "sparsify", {"config": {}})
    with pytest.raises(ValueError, match=r"is of another run: .*trained differs by"):
        kept.load()


def test_a_damaged_file_is_refused(tmp_path):
    model, dense = start(sparsify)
    sparsify(copy.deepcopy(model), dense, Checkpoint(tmp_path))
    path = tmp_path / "sparsify.safetensors"
    whole = path.read_bytes()
    for damaged, told in (
        (whole[:-7], "it is no safetensors file, or is cut short"),
        (whole[:-4096] + bytes(4096), "the checksum of .* is wrong"),  # a page that a power loss left empty
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"is no saved run of sadmoe, or is damaged: {told}"):
            sparsify(model, dense, Checkpoint(tmp_path))


def test_it_holds_no_pickle_and_its_state_is_json(tmp_path):
    model, dense = start(finetune)
    finetune(model, dense, Checkpoint(tmp_path))
    with safe_open(tmp_path / "finetune.safetensors", "pt") as file:
        header = json.loads(file.metadata()["sadmoe run"])
    assert len(header["state"]["history"]) == STEPS
    assert set(header["state"]["memory"]) == {"sum", "weight"}


def test_every_is_checked():
    with pytest.raises(ValueError, match="every must be at least 0 seconds, got -1"):
        Checkpoint("folder", every=-1)


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


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(tmp_path, monkeypatch):
    model, dense = start(sparsify)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"checkpoint: .*file is no folder"):
            sparsify(model, dense, Checkpoint(folder))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="checkpoint: nothing can be written into"):
        sparsify(model, dense, Checkpoint(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_ended_is_loaded_from_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    model, dense = start(sparsify)
    sparsify(model, dense, Checkpoint(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    again, dense = start(sparsify)
    sparsify(again, dense, Checkpoint(tmp_path))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_so_is_one_of_several_steps_each_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("sadmoe.training.loop.time", Clock(0.2))
    made = []
    for _ in range(2):
        model, dense = start(finetune)
        router = RouterConfig(steps=2, width=4)
        given = {"budget": 0.8, "seconds": 1.0, "router": router, "checkpoint": Checkpoint(tmp_path)}
        sadmoe.finetune_for_budget_(model, batches(), dense=dense, progress=False, **given)
        monkeypatch.setattr("os.access", lambda path, mode: False)
        made.append(model.state_dict())
    assert all(map(torch.equal, *(one.values() for one in made)))
