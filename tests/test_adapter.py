"""Adapter files: a conversion without the weights it was made from."""

import copy

import pytest
import sadmoe
import torch
from conversions import fingerprint, raising
from sadmoe import SavedModelError, adapter, load_adapter, restore_, save_adapter
from sadmoe.ffn import moe_layers
from safetensors.torch import load_file, save_file
from states import same, state
from tiny_models import TINY, Residual, UserFFN, call
from torch import nn

NAMES = ["bert", "gpt2", "llama", "t5", "vit", "phi3", "torch encoder", "user glu"]


def converted(name: str, projections: bool) -> nn.Module:
    model, batch = TINY[name].model(), TINY[name].batch()
    if projections:
        config = sadmoe.ProjectionConfig(steps=2, multiple=4)
        sadmoe.replace_projections_(model, [batch], config, progress=False)
    config = sadmoe.ConvertConfig(expert_size=4, tau=0.2, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [batch], config, progress=False)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("projections", [False, True])
def test_base_and_adapter_are_the_converted_model_and_the_base_comes_back(name, projections, tmp_path):
    if projections and name in ("torch encoder", "user glu"):
        pytest.skip("has no projection that can be replaced")
    model, base = converted(name, projections), TINY[name].model()
    save_adapter(model, tmp_path / "adapter.safetensors")
    before, modules, batch = state(base), dict(base.named_modules()), TINY[name].batch()
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert same(state(base), state(model))
    assert list(moe_layers(base)) == list(moe_layers(model))
    assert torch.equal(call(base, batch), call(model, batch))
    restore_(base)
    assert same(state(base), before)
    assert dict(base.named_modules()) == modules


def test_of_a_compiled_model_it_is_that_of_the_model(tmp_path):
    model = converted("user glu", projections=False)
    save_adapter(torch.compile(model), tmp_path / "a.safetensors")
    base, batch = TINY["user glu"].model(), TINY["user glu"].batch()
    load_adapter(torch.compile(base), tmp_path / "a.safetensors")
    assert torch.equal(call(base, batch), call(model, batch))


def test_it_holds_routers_and_permutations_only(tmp_path):
    model = converted("bert", projections=False)
    save_adapter(model, tmp_path / "adapter.safetensors")
    kinds = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter.safetensors")}
    assert kinds == {"v1", "v2", "permutation"}
    sadmoe.save(model, tmp_path / "whole.safetensors")
    small, whole = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("adapter", "whole"))
    assert small < whole / 4


def test_projections_that_are_not_converted_are_in_it_too(tmp_path):
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    sadmoe.replace_projections_(model, [batch], sadmoe.ProjectionConfig(steps=2), progress=False)
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = TINY["bert"].model()
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert torch.equal(call(base, batch), call(model, batch))
    restore_(base)
    assert same(state(base), state(TINY["bert"].model()))


def test_a_projection_s_mlp_with_an_activation_of_its_own_is_refused(tmp_path):
    model = TINY["bert"].model()
    sadmoe.replace_projections_(
        model, [TINY["bert"].batch()], sadmoe.ProjectionConfig(steps=2), progress=False
    )
    next(iter(sadmoe.ffn.bare_mlps(model).values())).act = nn.Hardswish()
    for save in (save_adapter, sadmoe.save):
        with pytest.raises(NotImplementedError, match="cannot be saved with an activation of type Hardswish"):
            save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_it_goes_onto_a_model_of_transformers_and_is_saved_whole(tmp_path):
    model = converted("llama", projections=True)
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = TINY["llama"].model()
    load_adapter(base, tmp_path / "adapter.safetensors")
    base.save_pretrained(tmp_path / "whole")
    again = type(base).from_pretrained(tmp_path / "whole")
    assert torch.equal(call(again, TINY["llama"].batch()), call(model, TINY["llama"].batch()))


def refused(base: nn.Module, path, message: str) -> None:
    before, modules = state(base), dict(base.named_modules())
    with pytest.raises(SavedModelError, match=message):
        load_adapter(base, path)
    assert same(state(base), before)
    assert dict(base.named_modules()) == modules


def test_another_base_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(converted("bert", projections=True), path)
    names = dict(TINY["bert"].model().named_parameters())
    for changed in ("encoder.layer.1.output.dense.weight", "encoder.layer.0.attention.self.key.bias"):
        assert changed in names
        base = TINY["bert"].model()
        with torch.no_grad():
            dict(base.named_parameters())[changed][0] += 1
        refused(base, path, "was made on another base: .* has other weights")
    refused(TINY["bert"].model().bfloat16(), path, "was made on another base: .* in the dtype it had")
    refused(TINY["gpt2"].model(), path, "was made on another base: .* is no linear layer here")


def test_a_router_wider_than_its_experts_stays_so(tmp_path):
    path, batch = tmp_path / "adapter.safetensors", TINY["bert"].batch()
    base = TINY["bert"].model().bfloat16()
    model = copy.deepcopy(base)
    config = sadmoe.ConvertConfig(expert_size=4, tau=0.2, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [batch], config, progress=False)
    sadmoe.compensate_(model, [batch], rank=1, progress=False)
    for layer in moe_layers(model).values():
        layer.router.float()
    save_adapter(model, path)
    load_adapter(base, path)
    assert same(state(base), state(model))
    assert {layer.router.v1.dtype for layer in moe_layers(base).values()} == {torch.float32}


def test_a_base_that_something_wraps_is_not_called_another(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    save_adapter(converted("bert", projections=False), tmp_path / "adapter.safetensors")
    base = TINY["bert"].model()
    accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True)
    refused(base, tmp_path / "adapter.safetensors", "is no FFN here .*something wraps or parametrises")


def test_another_activation_is_refused(tmp_path):
    model = TINY["bert"].model()
    sites = sadmoe.find_ffns(model)
    sadmoe.ffn.swap_activations_(model, sites, "relu")
    config = sadmoe.ConvertConfig(expert_size=4, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [TINY["bert"].batch()], config, progress=False)
    save_adapter(model, tmp_path / "adapter.safetensors")
    refused(TINY["bert"].model(), tmp_path / "adapter.safetensors", "has gelu, not relu")


def test_experts_that_were_trained_since_do_not_fit_the_base(tmp_path):
    model = converted("bert", projections=False)
    with torch.no_grad():
        next(iter(moe_layers(model).values())).w_down[0, 0, 0] += 1
    save_adapter(model, tmp_path / "adapter.safetensors")
    refused(
        TINY["bert"].model(), tmp_path / "adapter.safetensors", "trained after its conversion is saved whole"
    )


@pytest.mark.parametrize("projections", [False, True])
def test_what_was_trained_beside_the_experts_does_not_fit_the_base(projections, tmp_path):
    """As by a LoRA that was merged: no layer in the file knows of it."""
    model = converted("bert", projections)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3] += 1
    save_adapter(model, tmp_path / "adapter.safetensors")
    refused(
        TINY["bert"].model(), tmp_path / "adapter.safetensors", r"embeddings\.weight has other values\. Load"
    )


def test_an_ffn_with_several_names_goes_onto_its_base(tmp_path):
    def base():
        torch.manual_seed(0)
        shared = UserFFN()
        return nn.Sequential(Residual(shared), nn.Linear(24, 24), Residual(shared)).eval()

    model, again, x = base(), base(), torch.randn(5, 24)
    config = sadmoe.ConvertConfig(expert_size=4, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [x], config, progress=False)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))


def test_adapters_of_others_are_refused_and_what_is_missing_is_told(tmp_path):
    peft = pytest.importorskip("peft")
    model = converted("bert", projections=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"query is wrapped in an adapter.*: remove it, or merge it"):
        save_adapter(wrapped.base_model.model, tmp_path / "a.safetensors")
    model = converted("bert", projections=False)
    model.register_buffer("more", torch.zeros(2))
    save_adapter(model, tmp_path / "a.safetensors")
    refused(TINY["bert"].model(), tmp_path / "a.safetensors", "another base: more is not here")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = converted("bert", projections=False)
    save_adapter(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused(
        TINY["bert"].model(),
        path,
        "is no adapter that sadmoe wrote, or is damaged: it is no safetensors file",
    )
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    refused(TINY["bert"].model(), path, "or is damaged: the checksum of .* is wrong; copy or save it again")
    save_file({"a": torch.ones(1)}, path)
    refused(TINY["bert"].model(), path, "or is damaged: it has no 'sadmoe adapter' in its metadata")
    sadmoe.save(model, tmp_path / "whole.safetensors")
    refused(TINY["bert"].model(), tmp_path / "whole.safetensors", "is no adapter")


def test_a_load_that_is_interrupted_leaves_the_base_as_it_was(tmp_path, monkeypatch):
    save_adapter(converted("bert", projections=True), tmp_path / "adapter.safetensors")
    base = TINY["bert"].model()
    before = fingerprint(base)
    monkeypatch.setattr("sadmoe.adapter.rebuild", raising(KeyboardInterrupt, 3, adapter.rebuild))
    with pytest.raises(KeyboardInterrupt):
        load_adapter(base, tmp_path / "adapter.safetensors")
    assert fingerprint(base) == before


def test_wrong_calls_are_named(tmp_path):
    model, path = converted("bert", projections=False), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_adapter(model, path)
    save_adapter(copy.deepcopy(model), path, overwrite=True)
    with pytest.raises(ValueError, match="converted already: load_adapter takes the dense base"):
        load_adapter(model, path)
    with pytest.raises(ValueError, match="nothing to save"):
        save_adapter(TINY["bert"].model(), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_adapter(TINY["bert"].model(), tmp_path / "missing")


@pytest.mark.parametrize("projections", [False, True])
def test_layers_that_were_compiled_alone_are_saved_by_their_names(tmp_path, projections):
    model, batch = converted("bert", projections), TINY["bert"].batch()
    wanted = call(model, batch)
    for name, layer in moe_layers(model).items():
        model.set_submodule(name, torch.compile(layer))
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = TINY["bert"].model()
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert torch.equal(call(base, batch), wanted)


def test_it_goes_onto_a_base_whose_blocks_are_compiled(tmp_path):
    model = converted("bert", projections=True)
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = TINY["bert"].model()
    base.encoder.layer[0] = torch.compile(base.encoder.layer[0])
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert list(moe_layers(base)) == list(moe_layers(model))


def test_projections_on_a_frozen_base_are_frozen_and_so_is_what_comes_back(tmp_path):
    save_adapter(converted("bert", projections=True), tmp_path / "adapter.safetensors")
    base = TINY["bert"].model().requires_grad_(False)
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert not any(p.requires_grad for p in base.parameters())
    restore_(base)
    assert not any(p.requires_grad for p in base.parameters())


def test_a_model_that_was_cast_fits_its_base_in_that_dtype(tmp_path):
    model = converted("bert", projections=True).bfloat16()
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = TINY["bert"].model().bfloat16()
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert same(state(base), state(model))


def test_weights_that_are_elsewhere_are_told(tmp_path):
    model = converted("bert", projections=False)
    next(iter(moe_layers(model).values())).router.to("meta")
    with pytest.raises(
        ValueError, match=r"router.v1 has no values here \(offloaded, or on the meta device\)"
    ):
        save_adapter(model, tmp_path / "adapter.safetensors")
    mlps = TINY["bert"].model()
    sadmoe.replace_projections_(
        mlps, [TINY["bert"].batch()], sadmoe.ProjectionConfig(steps=2), progress=False
    )
    name, mlp = next(iter(sadmoe.ffn.bare_mlps(mlps).items()))
    mlp.to("meta")
    with pytest.raises(ValueError, match=f"{name}.up.weight has no values here"):
        restore_(mlps)
    assert not mlp.__dict__["original"].weight.is_meta
