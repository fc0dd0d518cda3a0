"""`sadmoe.save` and `load`: what comes back, and what is refused."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import sadmoe
import torch
from conversions import fingerprint
from converted import converted
from sadmoe import files
from sadmoe.convert import ConvertConfig, convert_, restore_
from sadmoe.dial import set_tau
from sadmoe.ffn import find_ffns, layer_from_dense, moe_layers, swap_activations_, swap_in
from sadmoe.gates import DynamicK, TopK
from sadmoe.routers import RouterConfig
from sadmoe.saving import load, save
from safetensors.torch import load_file
from tiny_models import TINY, UserFFN, call
from torch import Tensor, nn
from torch.nn.utils import prune

NAMES = [
    *("bert", "gpt2", "t5", "llama", "gemma", "phi3", "albert", "vit"),
    *("timm vit", "torchvision vit", "torch encoder", "user glu"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(converted("user glu"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("write", "read"), [(save, load), (sadmoe.save_adapter, sadmoe.load_adapter)])
def test_of_compiled_parts_the_parts_are_saved(write, read, tmp_path):
    model, fresh = converted("bert"), TINY["bert"].model()
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    write(model, tmp_path / "m.safetensors")
    read(fresh, tmp_path / "m.safetensors")
    batch = TINY["bert"].batch()
    assert torch.equal(call(fresh, batch), call(converted("bert"), batch))


@pytest.mark.parametrize(("write", "read"), [(save, load), (sadmoe.save_adapter, sadmoe.load_adapter)])
def test_of_a_parallel_model_the_model_inside_is_saved_and_loaded(write, read, tmp_path):
    model, batch = converted("bert"), TINY["bert"].batch()
    write(nn.DataParallel(model, device_ids=[]), tmp_path / "m.safetensors")
    for wrapped in (False, True):
        fresh = TINY["bert"].model()
        read(nn.DataParallel(fresh, device_ids=[]) if wrapped else fresh, tmp_path / "m.safetensors")
        assert torch.equal(call(fresh, batch), call(model, batch))


@pytest.mark.parametrize("part", ["w_down", "router.v1"])
def test_weights_that_are_made_at_every_access_are_not_saved(part, tmp_path):
    """No dense model could be loaded from them."""
    model = converted("bert")
    name, layer = next(iter(moe_layers(model).items()))
    owner, _, key = part.rpartition(".")
    prune.l1_unstructured(layer.get_submodule(owner), key, amount=0.5)
    for write in (save, sadmoe.save_adapter, type(model).save_pretrained):
        with pytest.raises(ValueError, match=rf"{name}.{part} is made of other tensors .* prune.remove"):
            write(model, tmp_path / "m.safetensors")
    prune.remove(layer.get_submodule(owner), key)
    save(model, tmp_path / "m.safetensors")


class Shared(nn.parallel.DistributedDataParallel):
    """Without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("read", [load, sadmoe.load_adapter])
def test_nothing_is_loaded_into_a_model_whose_gradients_are_shared(read, file):
    model = TINY["user glu"].model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"model is a DistributedDataParallel, .*: give the model inside"):
        read(Shared(model), file)
    assert fingerprint(model) == before


CONVERTED = ("restore_", "finetune_", "finetune_layers_", "compensate_", "quantize_experts_")


@pytest.mark.parametrize("change", ["convert_", "replace_projections_", "sparsify_", *CONVERTED])
def test_nor_is_one_converted_or_trained(change):
    model = converted("bert") if change in CONVERTED else TINY["bert"].model()
    configs = {
        "sparsify_": sadmoe.SparsifyConfig(steps=1),
        "finetune_": sadmoe.FinetuneConfig(steps=1),
        "finetune_layers_": sadmoe.FinetuneConfig(steps=1),
    }
    before = fingerprint(model)
    config = [configs[change]] if change in configs else []
    args = [] if change in ("restore_", "quantize_experts_") else [[TINY["bert"].batch()], *config]
    with pytest.raises(ValueError, match=r"model is a DistributedDataParallel, .*: give the model inside"):
        getattr(sadmoe, change)(Shared(model), *args, **({"teacher": model} if "layers" in change else {}))
    assert fingerprint(model) == before


def test_what_a_module_keeps_of_a_call_does_not_hinder_loading(file):
    model = TINY["user glu"].model()
    with pytest.warns(FutureWarning):  # of the older of torch's two
        model.head = nn.utils.weight_norm(
            nn.Linear(24, 3, bias=False)
        )  # it keeps a weight made of two parameters
    model.kept = [torch.ones(2, requires_grad=True) * 2]
    config = ConvertConfig(experts=6, router=RouterConfig(steps=1, width=4))
    convert_(model, [TINY["user glu"].batch()], config, progress=False)
    path = file.with_name("normed.safetensors")
    save(model, path)
    again = TINY["user glu"].model()
    with pytest.warns(FutureWarning):
        again.head = nn.utils.weight_norm(nn.Linear(24, 3, bias=False))
    again.kept = [torch.ones(2, requires_grad=True) * 2]
    load(again, path)
    x = torch.randn(2, 24)
    assert torch.equal(again.head(x), model.head(x))


def test_a_compiled_part_is_loaded_too(tmp_path):
    model, fresh = (nn.Sequential(TINY["user glu"].build(), nn.Linear(24, 3)).eval() for _ in range(2))
    convert_(
        model,
        [torch.randn(2, 5, 24)],
        ConvertConfig(experts=6, router=RouterConfig(width=4, steps=2)),
        progress=False,
    )
    save(model, tmp_path / "m.safetensors")
    inner = fresh[1]
    fresh[1] = torch.compile(inner, backend="eager")
    load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(inner.weight, model[1].weight)
    x = torch.randn(2, 5, 24)
    assert torch.equal(fresh(x), model(x))


def test_of_a_compiled_model_the_model_is_saved(tmp_path):
    model = converted("user glu")
    save(torch.compile(model), tmp_path / "m.safetensors")
    fresh = TINY["user glu"].build().eval()
    load(torch.compile(fresh), tmp_path / "m.safetensors")
    assert torch.equal(call(fresh, TINY["user glu"].batch()), call(model, TINY["user glu"].batch()))


class Positions(nn.Module):
    """A table that grows with what it is run on, as of M2M100."""

    def __init__(self):
        super().__init__()
        self.inner = UserFFN(nn.ReLU())
        self.register_buffer("table", torch.zeros(1, 2, 1), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.table.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]
        return self.inner(x + self.table[:, : x.shape[1]])


def test_a_table_that_has_grown_is_loaded_as_it_was_saved(tmp_path):
    model, x = Positions().eval(), torch.randn(2, 5, 24)
    config = ConvertConfig(expert_size=10, router=RouterConfig(width=4, steps=2))
    convert_(model, [x], config, progress=False)
    save(model, tmp_path / "m.safetensors")
    fresh = Positions().eval()
    load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh.table, model.table)
    assert torch.equal(fresh(x), model(x))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: make it first"):
        save(converted("user glu"), tmp_path / "nowhere" / "m.safetensors")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_computes_the_same_bits(name, device, tmp_path):
    model = converted(name)
    set_tau(model, 0.3)
    save(model, tmp_path / "m.safetensors")
    with torch.device(device):
        fresh = TINY[name].build().eval()
    random = torch.get_rng_state()
    load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(call(fresh, TINY[name].batch()), call(model, TINY[name].batch()))
    a, b = model.state_dict(), fresh.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))


def test_loading_mlps_for_projections_moves_no_random_numbers(tmp_path):
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    config = sadmoe.ProjectionConfig(steps=1, multiple=4)
    sadmoe.replace_projections_(model, [batch], config, progress=False)
    convert_(model, [batch], ConvertConfig(expert_size=4, router=RouterConfig(steps=1)), progress=False)
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["bert"].model()
    before = torch.get_rng_state()
    load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_restores_to_the_dense_one(tmp_path):
    dense, model = TINY["bert"].model(), converted("bert")
    save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        fresh = TINY["bert"].build().eval()
    load(fresh, tmp_path / "m.safetensors")
    restore_(fresh)
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "torch encoder"])
def test_a_sparsified_model_restores_with_its_activation(name, tmp_path):
    model, batch = TINY[name].model(), TINY[name].batch()
    swap_activations_(model, find_ffns(model), "relu")
    wanted = call(model, batch)
    for site in find_ffns(model):
        dense = site.dense()
        swap_in(model, site, layer_from_dense(dense, torch.arange(dense.f), 6, 16))
    save(model, tmp_path / "m.safetensors")
    fresh = TINY[name].build().eval()
    load(fresh, tmp_path / "m.safetensors")
    restore_(fresh)
    assert torch.equal(call(fresh, batch), wanted)
    assert {site.act for site in find_ffns(fresh)} == {"relu"}


def test_the_file_decides_the_dtype_and_the_model_what_is_frozen(tmp_path):
    model = converted("user glu").to(torch.bfloat16)
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["user glu"].build().eval()
    fresh[0].norm.requires_grad_(False)
    load(fresh, tmp_path / "m.safetensors")
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert torch.equal(fresh(TINY["user glu"].batch().bfloat16()), model(TINY["user glu"].batch().bfloat16()))
    assert [p.requires_grad for p in fresh[0].norm.parameters()] == [False, False]
    assert fresh[1].norm.weight.requires_grad


@pytest.mark.parametrize("tau", [torch.tensor(0.25), numpy.float32(0.25)])
def test_a_tau_may_be_any_scalar(tau, tmp_path):
    model = converted("user glu")
    set_tau(model, tau)
    save(model, tmp_path / "m.safetensors")
    assert {layer.gate for layer in moe_layers(model).values()} == {DynamicK(0.25)}


@pytest.mark.parametrize("gate", [DynamicK(0.1), DynamicK(1 / 3, true_norms=True), TopK(3)])
def test_gates_come_back_as_they_were(gate, tmp_path):
    model = converted("user glu")
    for layer in moe_layers(model).values():
        layer.gate = gate
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["user glu"].build()
    load(fresh, tmp_path / "m.safetensors")
    assert [layer.gate for layer in moe_layers(fresh).values()] == [gate, gate]


def test_layers_may_differ_in_their_gates_and_in_what_their_routers_predict(tmp_path):
    model = converted("user glu")
    first, second = moe_layers(model).values()
    first.gate, second.gate = DynamicK(0.2), TopK(2)
    first.router.target_power = 0.5
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["user glu"].build()
    load(fresh, tmp_path / "m.safetensors")
    assert [layer.gate for layer in moe_layers(fresh).values()] == [DynamicK(0.2), TopK(2)]
    assert [layer.router.target_power for layer in moe_layers(fresh).values()] == [0.5, 1.0]


class MakesItsTable(nn.Module):
    """Makes a buffer that state_dict leaves out when it is first called."""

    def __init__(self):
        super().__init__()
        self.ffn = TINY["user glu"].build()
        self.register_buffer("table", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return self.ffn(x + self.table)


def test_buffers_that_a_forward_makes_are_left_to_it(tmp_path):
    torch.manual_seed(0)
    model, batch = MakesItsTable().eval(), TINY["user glu"].batch()
    convert_(model, [batch], ConvertConfig(experts=6, router=RouterConfig(width=4, steps=1)), progress=False)
    assert model.table is not None
    save(model, tmp_path / "m.safetensors")
    for used in (False, True):
        fresh = MakesItsTable().eval()
        if used:
            fresh(batch)
        load(fresh, tmp_path / "m.safetensors")
        assert torch.equal(fresh(batch), model(batch))
    del model.table
    model.register_buffer("table", None, persistent=False)
    save(model, tmp_path / "n.safetensors")
    load(fresh := MakesItsTable().eval(), tmp_path / "n.safetensors")
    assert torch.equal(fresh(batch), model(batch))


class Packed(nn.Linear):
    """Saves what is no parameter and no buffer, as quantised layers do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}packed"] = self.weight.half(), 0.5


def test_state_that_is_no_tensor_is_not_lost_without_a_word(tmp_path):
    with pytest.raises(
        NotImplementedError, match=r"1\.packed is extra state of a module, neither a parameter nor"
    ):
        save(nn.Sequential(converted("user glu"), Packed(24, 24)), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    model, batch = nn.Sequential(TINY["user glu"].model(), Packed(24, 24)), TINY["user glu"].batch()
    config = ConvertConfig(experts=6, router=RouterConfig(width=4, steps=1))
    convert_(model, [batch], config, progress=False, checkpoint=sadmoe.Checkpoint(tmp_path))


def test_dropout_comes_back(tmp_path):
    model = converted("user module")
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["user module"].build()
    load(fresh, tmp_path / "m.safetensors")
    assert [layer.dropout.p for layer in moe_layers(fresh).values()] == [0.25, 0.25]


def test_dropout_is_that_of_the_model_loaded_into_and_stays_so_on_the_way_back(tmp_path):
    model = converted("user module")
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["user module"].build()
    drops = [module for module in fresh.modules() if isinstance(module, torch.nn.Dropout)]
    for drop in drops:
        drop.p = 0.5
    load(fresh, tmp_path / "m.safetensors")
    layers = list(moe_layers(fresh).values())
    assert [layer.dropout.p for layer in layers] == [0.5] * len(drops) == [0.5, 0.5]
    for layer in layers:
        layer.dropout.p = 0.0
    sadmoe.restore_(fresh)
    assert [drop.p for drop in drops] == [0.0, 0.0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_stored_once_and_tied_again(device, tmp_path):
    model = converted("gpt2")
    save(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert ("lm_head.weight" in stored) != ("transformer.wte.weight" in stored)
    with torch.device(device):
        fresh = TINY["gpt2"].build()
    load(fresh, tmp_path / "m.safetensors")
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_tensors_that_overlap_or_are_not_contiguous_are_saved(tmp_path):
    def build() -> nn.Module:
        model = TINY["user glu"].build()
        both = torch.arange(24.0)
        model.register_buffer("low", both[:16])
        model.register_buffer("high", both[8:])
        model.register_buffer("across", torch.arange(6.0).view(2, 3).t(), persistent=False)
        model.register_buffer("scalar", torch.tensor(3))
        model.register_buffer("nothing", torch.empty(0, 2))
        return model

    model = build()
    donor = converted("user glu")
    for child, other in (("0", donor[0]), ("1", donor[1])):
        setattr(model, child, other)
    save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        fresh = build()
    load(fresh, tmp_path / "m.safetensors")
    for name in ("low", "high", "across", "scalar", "nothing"):
        assert torch.equal(getattr(fresh, name), getattr(model, name))


def test_a_file_is_not_replaced_unless_asked(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="is there already; pass overwrite=True to replace it"):
        save(converted("bert"), file)
    assert file.read_bytes() == before
    save(converted("bert"), file, overwrite=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(file, error, monkeypatch):
    before = file.read_bytes()

    def half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise error("disk full")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(error, match="disk full"):
        save(converted("bert"), file, overwrite=True)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_directory_of_a_file_is_no_file(tmp_path):
    with pytest.raises(FileExistsError, match="is a directory; give a file"):
        save(converted("user glu"), tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="is a directory; was it written by save_pretrained"):
        load(TINY["user glu"].build(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load(TINY["user glu"].build(), tmp_path / "none.safetensors")


def test_only_converted_models_are_saved_and_only_dense_ones_loaded(file, tmp_path):
    with pytest.raises(ValueError, match="nothing to save: no FFN of this Sequential is converted"):
        save(TINY["user glu"].model(), tmp_path / "dense.safetensors")
    with pytest.raises(
        ValueError, match="2 FFNs of this model are converted already: load takes a dense model"
    ):
        load(converted("user glu"), file)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    model = converted("user glu")

    @dataclass
    class Mine:
        true_norms: bool = False

        def mask(self, scores: Tensor) -> Tensor:
            return scores > 0

    moe_layers(model)["0.inner"].gate = Mine()
    with pytest.raises(
        NotImplementedError, match="a gate of type Mine cannot be saved; these can: dynamic_k, top_k"
    ):
        save(model, tmp_path / "m.safetensors")

    class Extra(nn.Module):
        def get_extra_state(self) -> dict:
            return {"a": 1}

    model = converted("user glu")
    model.append(Extra())
    with pytest.raises(NotImplementedError, match=r"2\._extra_state is extra state of a module"):
        save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is on the meta device and has no values to save"):
        save(converted("user glu").to("meta"), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_does_not_need_the_file(file):
    model = TINY["user glu"].build().eval()
    load(model, file)
    expected = model(TINY["user glu"].batch())
    file.write_bytes(b"")
    assert torch.equal(model(TINY["user glu"].batch()), expected)


def test_it_is_loaded_into_a_model_whose_ffns_are_compiled(tmp_path):
    model, batch = converted("gpt2"), TINY["gpt2"].batch()
    save(model, tmp_path / "model.safetensors")
    fresh = TINY["gpt2"].model()
    for name in moe_layers(model):
        fresh.set_submodule(name, torch.compile(fresh.get_submodule(name)))
    load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(call(fresh, batch), call(model, batch))


def test_it_is_loaded_into_a_model_that_cannot_be_copied(tmp_path):
    model, batch = converted("bert"), TINY["bert"].batch()
    save(model, tmp_path / "model.safetensors")
    fresh = TINY["bert"].model()
    fresh.lock = threading.Lock()
    load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(call(fresh, batch), call(model, batch))
