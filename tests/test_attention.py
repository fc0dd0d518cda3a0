"""Projections of attention as MLPs: found, distilled, converted, counted, restored, saved."""

import copy
from dataclasses import replace

import pytest
import sadmoe
import torch
from sadmoe import (
    ConvertConfig,
    ProjectionConfig,
    RouterConfig,
    find_projections,
    replace_projections_,
    restore_,
)
from sadmoe.attention import scan_projections, start_low_rank_
from sadmoe.ffn import ProjectionMLP, empty_mlp, find_ffns, moe_layers, projection_mlps
from states import same, state
from tiny_models import TINY, call, tokens
from torch import Tensor, nn

SEPARATE = {"q": (24, 24), "k": (24, 24), "v": (24, 24), "o": (24, 24)}
GROUPED = {"q": (24, 24), "k": (24, 12), "v": (24, 12), "o": (24, 24)}
FAMILIES = {  # the (d, d_out) of the projections of one block
    "bert": SEPARATE,
    "vit": SEPARATE,
    "dinov2": SEPARATE,
    "gpt2": {"qkv": (24, 72), "o": (24, 24)},
    "llama": GROUPED,
    "gemma": GROUPED,
}
SHORT = ProjectionConfig(steps=3, multiple=4)
CONVERT = ConvertConfig(expert_size=4, tau=0.2, router=RouterConfig(steps=2, width=4))


def replaced(name: str, config: ProjectionConfig = SHORT) -> nn.Module:
    model = TINY[name].model()
    replace_projections_(model, [TINY[name].batch()], config, progress=False)
    return model


def replaced_and_converted(name: str) -> nn.Module:
    model = replaced(name)
    sadmoe.convert_(model, [TINY[name].batch()], CONVERT, progress=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_found_and_no_other_linear_layer(family):
    sites = find_projections(TINY[family].model())
    shapes = [sadmoe.ffn.linears.linear_shape(place.linear) for place in sites]
    assert shapes == list(FAMILIES[family].values()) * 2  # blocks


def test_other_families_have_projections_too():
    counts = {name: len(find_projections(TINY[name].model())) for name in ("t5", "opt", "phi3", "timm vit")}
    assert counts == {"t5": 12, "opt": 8, "phi3": 4, "timm vit": 4}


class SelfAttention(nn.Module):
    """Its heads' bias is learnt by an MLP of its own, as in Swin v2."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
        self.bias = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))


class MaskedAttentionDecoder(nn.Module):
    """More than an attention: its predictors of masks are no projections."""

    def __init__(self):
        super().__init__()
        self.attn, self.mask_predictor = SelfAttention(), nn.Linear(8, 8)


def test_only_what_an_attention_itself_projects_is_a_projection():
    sites = find_projections(nn.Sequential(MaskedAttentionDecoder()))
    assert [site.name for site in sites] == ["0.attn.qkv", "0.attn.out.0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_become_ffns_are_converted_and_come_back_bit_for_bit(family):
    tiny = TINY[family]
    model, batch = tiny.model(), tiny.batch()
    before, dense, modules = state(model), call(model, batch), dict(model.named_modules())
    names = [site.name for site in find_projections(model)]
    report = replace_projections_(model, [batch], SHORT, progress=False)
    assert [fit.name for fit in report.layers] == names == list(projection_mlps(model))
    assert names[0] in str(report)
    ffns = [site.name for site in find_ffns(model)]
    assert set(ffns) == {*names, *tiny.names}

    as_mlps = call(model, batch)
    assert not torch.equal(as_mlps, dense)
    conversion = sadmoe.convert_(model, [batch], CONVERT, progress=False)
    assert [row.name for row in conversion.layers] == ffns
    assert set(moe_layers(model)) == set(ffns)
    with sadmoe.tau(model, 0.0):
        torch.testing.assert_close(call(model, batch), as_mlps)
    assert {layer.name for layer in sadmoe.cost(model, [batch]).layers} == set(ffns)

    sadmoe.restore_(model, projections=False)
    assert torch.equal(call(model, batch), as_mlps)
    assert list(projection_mlps(model)) == names
    restore_(model)
    assert same(state(model), before)
    assert dict(model.named_modules()) == modules  # the same objects
    assert torch.equal(call(model, batch), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_of_full_rank_leave_the_model_what_it_was(family):
    model, batch = TINY[family].model(), TINY[family].batch()
    dense = call(model, batch)
    config = ProjectionConfig(ratio=9.0, multiple=2, steps=1, lr=1e-12)  # half of the width is at least d_out
    replace_projections_(model, [batch], config, progress=False)
    torch.testing.assert_close(call(model, batch), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("d", "d_out"), [(768, 768), (384, 384), (576, 192), (768, 2304), (24, 12)])
def test_an_mlp_costs_what_its_projection_did(d, d_out):
    width = ProjectionConfig(multiple=1).width_of(d, d_out)
    assert width * (d + d_out) == pytest.approx(d * d_out, rel=0.5 / width)
    assert ProjectionConfig().width_of(d, d_out) % 8 == 0
    weights = [
        p.numel() for name, p in empty_mlp(nn.Linear(d, d_out), width).named_parameters() if "weight" in name
    ]
    assert sum(weights) == pytest.approx(d * d_out, rel=0.5 / width)


def test_the_paper_s_width():
    for ratio, width in ((1.0, 384), (0.5, 192), (2.0, 768)):
        assert ProjectionConfig(ratio=ratio, multiple=1).width_of(768, 768) == width


def test_widths_are_rounded_to_the_nearest_multiple():
    for d, d_out, multiple, width in (
        (100, 100, 8, 48), (108, 108, 8, 56), (4, 4, 8, 8), (10, 7, 1, 4), (9, 7, 1, 4),
    ):  # exactly 50, 54, 2, 4.12 and 3.94  # fmt: skip
        assert ProjectionConfig(multiple=multiple).width_of(d, d_out) == width
    whole = sum(
        p.numel() for p in empty_mlp(nn.Linear(768, 768), ProjectionConfig().width_of(768, 768)).parameters()
    )
    assert whole == pytest.approx(768 * 768 + 768, rel=1e-3)  # with biases


def test_training_lowers_the_error_and_sparsity_costs_some_of_it():
    batches = [tokens() | {"input_ids": torch.randint(3, 50, (2, 9), generator=g)} for g in generators(12)]
    long = {"steps": 150, "multiple": 4, "lr": 3e-3}
    fits = {}
    for alpha in (0.0, 1.0):
        model = TINY["bert"].model()
        report = replace_projections_(model, batches, ProjectionConfig(alpha=alpha, **long), progress=False)
        fits[alpha] = report.layers
    assert all(fit.error < 0.8 * fit.start_error for fit in fits[0.0])
    zero = {alpha: sum(fit.zero for fit in layers) for alpha, layers in fits.items()}
    assert zero[1.0] > zero[0.0]


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_start_of_full_rank_is_the_projection(act, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 6, bias), torch.randn(40, 10)
    mlp = empty_mlp(linear, 13, act)
    start_low_rank_(mlp, linear, linear(x).detach().split(7))
    torch.testing.assert_close(mlp(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_start_of_one_neuron_has_no_direction():
    linear = nn.Linear(10, 6)
    mlp = empty_mlp(linear, 1)
    start_low_rank_(mlp, linear, [linear(torch.randn(40, 10)).detach()])
    torch.testing.assert_close(mlp(torch.zeros(2, 10)), torch.zeros(2, 6))


def test_a_start_of_low_rank_leaves_the_smallest_directions():
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 6), torch.randn(40, 10)
    mlp, y = empty_mlp(linear, 4), linear(x).detach()
    start_low_rank_(mlp, linear, [y])
    singular = torch.linalg.svdvals(y)
    torch.testing.assert_close((mlp(x) - y).square().sum(), singular[2:].square().sum())


def test_what_is_not_finite_is_told_by_name():
    model = TINY["bert"].model()
    value = model.encoder.layer[1].attention.self.value
    value.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer.1.attention.self.value: not every output is finite"):
        replace_projections_(model, [tokens()], SHORT, progress=False)


def test_the_same_seed_gives_the_same_bits_and_the_global_one_is_left_alone():
    torch.manual_seed(9)
    a = state(replaced("llama", ProjectionConfig(steps=2, start="random")))
    expected = torch.rand(3)
    torch.manual_seed(9)
    TINY["llama"].model()
    b = state(replaced("llama", ProjectionConfig(steps=2, start="random")))
    assert same(a, b)
    assert torch.equal(torch.rand(3), expected)
    assert not same(a, state(replaced("llama", ProjectionConfig(steps=2, start="random", seed=1))))


def test_a_random_start_goes_on_for_its_own_projections_alone(tmp_path):
    """What begins alike is told apart by what it learns."""
    config, settings = ProjectionConfig(steps=2, start="random"), {"progress": False}
    settings["checkpoint"] = sadmoe.Checkpoint(tmp_path)
    model, other = TINY["bert"].model(), TINY["bert"].model()
    replace_projections_(model, [TINY["bert"].batch()], config, **settings)
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight[0] += 1
    with pytest.raises(ValueError, match=r"another run: .*the bits of its model were others"):
        replace_projections_(other, [TINY["bert"].batch()], config, **settings)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
@pytest.mark.parametrize("make", [replaced, replaced_and_converted])
def test_saved_and_loaded_bit_for_bit(name, make, tmp_path):
    model, batch = make(name), TINY[name].batch()
    sadmoe.save(model, tmp_path / "whole.safetensors")
    model.save_pretrained(tmp_path / "folder")
    dense = TINY[name].model()
    sadmoe.load(dense, tmp_path / "whole.safetensors")
    loaded = type(model).from_pretrained(tmp_path / "folder")
    for again in (dense, loaded):
        assert same(state(again), state(model))
        assert torch.equal(call(again, batch), call(model, batch))
        with pytest.raises(ValueError, match="were not saved with the model"):
            restore_(again)
        assert same(state(again), state(model))
    if make is replaced_and_converted:
        restore_(loaded, projections=False)
        assert list(projection_mlps(loaded)) == list(projection_mlps(model))


def test_the_masks_of_attention_are_made_again_where_its_projections_were_replaced(tmp_path):
    """GPT-Neo's are in no file: transformers makes them when it initialises the module that holds the projections."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 72, "window_size": 4}
    kinds = [[["global", "local"], 1]]
    config = transformers.GPTNeoConfig(vocab_size=50, attention_types=kinds, **sizes)
    model, batch = transformers.GPTNeoForCausalLM(config).eval(), {"input_ids": torch.arange(18).view(2, 9)}
    replace_projections_(model, [batch], ProjectionConfig(steps=2), progress=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(call(loaded, batch), call(model, batch))


def test_a_copy_is_restored_too_and_in_the_dtype_it_was_cast_to():
    model = replaced_and_converted("bert")
    twin = copy.deepcopy(model).to(torch.bfloat16)
    restore_(twin)
    dense = TINY["bert"].model()
    assert same(state(twin), state(dense.to(torch.bfloat16)))
    restore_(model)
    assert same(state(model), state(TINY["bert"].model()))


def test_a_filter_leaves_projections_alone():
    config = ProjectionConfig(steps=1, filter=lambda name: name.endswith("query"))
    model = replaced("bert", config)
    assert list(projection_mlps(model)) == [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]


def test_projections_have_their_own_routers_and_expert_size():
    model = replaced("bert")
    config = ConvertConfig(
        experts=6, router=RouterConfig(steps=1, width=8), projection_router=RouterConfig(steps=1, width=4),
        projection_expert_size=2,
    )  # fmt: skip
    sadmoe.convert_(model, [TINY["bert"].batch()], config, progress=False)
    shapes = {(layer.expert_size, layer.router.v1.shape[0]) for layer in moe_layers(model).values()}
    assert shapes == {(10, 8), (2, 4)}


def test_sparsify_trains_them_with_the_ffns_and_against_the_model_before():
    dense, model, batch = TINY["bert"].model(), replaced("bert"), TINY["bert"].batch()
    config = sadmoe.SparsifyConfig(steps=30, lr=3e-3, alpha=0.1)
    report = sadmoe.sparsify_(model, [batch], config, teacher=dense, progress=False)
    assert len(report.after) == 10
    assert report.history[-1].objective < report.history[0].objective


class PoolAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class PooledByAttention(nn.Module):
    """Its attention is in no list of blocks, as timm's pool of tokens."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.attn_pool = PoolAttention()

    def forward(self, x):
        return self.attn_pool(x + self.block(x))


def test_projections_in_no_list_are_trained_against_the_model_before():
    dense, batch = PooledByAttention().eval(), torch.randn(2, 5, 8)
    model = copy.deepcopy(dense)
    config = ProjectionConfig(steps=2, multiple=4)
    assert len(replace_projections_(model, [batch], config, progress=False).layers) == 2
    config = sadmoe.SparsifyConfig(steps=30, lr=3e-3, alpha=0.1)
    report = sadmoe.sparsify_(model, [batch], config, teacher=dense, progress=False)
    assert report.history[-1].objective < report.history[0].objective


@pytest.mark.parametrize("failing", ["train", "put in"])
def test_a_failure_leaves_the_model_as_it_was(failing, monkeypatch):
    model = TINY["llama"].model()
    before, modules = state(model), dict(model.named_modules())
    calls = []

    def stand_in(model, name, mlp):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        sadmoe.ffn.stand_in(model, name, mlp)

    config = SHORT
    if failing == "put in":
        monkeypatch.setattr("sadmoe.attention.stand_in", stand_in)
    else:
        config = ProjectionConfig(steps=20, lr=1e30)
    with pytest.raises(KeyboardInterrupt if failing == "put in" else FloatingPointError):
        replace_projections_(model, [TINY["llama"].batch()], config, progress=False)
    assert same(state(model), before)
    assert dict(model.named_modules()) == modules


def test_what_cannot_be_replaced_says_why():
    with pytest.raises(NotImplementedError, match="reads its weights itself"):
        find_projections(TINY["torch encoder"].model())
    with pytest.raises(ValueError, match="no projection of attention found in this Sequential"):
        find_projections(TINY["user module"].model())
    with pytest.raises(ValueError, match="8 are MLPs already"):
        find_projections(replaced("bert"))


def test_what_lies_in_a_wrapped_projection_is_none():
    class Adapted(nn.Module):
        """As PEFT's: a linear layer with a low-rank one beside it."""

        def __init__(self, base: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = base.in_features, base.out_features
            self.base_layer, self.lora = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora(x)

    model = TINY["bert"].model()
    for name in [name for name, _ in model.named_modules() if name.endswith("attention.self")]:
        attention = model.get_submodule(name)
        attention.query = Adapted(attention.query)
    found, refused = scan_projections(model)
    assert [site.name for site in found if ".query" in site.name] == []
    assert len([line for line in refused if ".query: query is a Adapted;" in line]) == len(refused) > 0


class ReadAttention(nn.Module):
    """The weight of one projection is read, as Swin's and BEiT's, or of both, as where an index is in another dtype."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.both = nn.Linear(24, 24), nn.Linear(24, 24), both

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return self.proj(x.to(self.proj.weight.dtype) if self.both else x)


def test_projections_whose_weight_is_read_are_left_out(caplog):
    model, batches = nn.Sequential(ReadAttention()), [torch.randn(2, 5, 24)]
    before, qkv = state(model), model[0].qkv
    assert [site.name for site in find_projections(model, batches=batches)] == ["0.proj"]
    assert same(state(model), before)
    assert model[0].qkv is qkv
    report = replace_projections_(model, batches, SHORT, progress=False)
    assert [fit.name for fit in report.layers] == ["0.proj"]
    assert "1 projections are not replaced:\n  0.qkv: what is around it reads its weight, bias" in caplog.text
    model(batches[0])
    with pytest.raises(
        NotImplementedError, match=r"0\.qkv: .* weight, bias\n  0\.proj: .* reads its weight$"
    ):
        replace_projections_(nn.Sequential(ReadAttention(both=True)), batches, SHORT, progress=False)


class AskingAttention(ReadAttention):
    """Asks for the parameters of a projection, which any module has, and for its kind."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.qkv, nn.Linear | ProjectionMLP) or hasattr(self.qkv, "base_layer"):
            raise TypeError("an unknown kind")
        return self.proj(self.qkv(x.to(next(self.proj.parameters()).dtype)))


def test_what_any_module_has_may_be_read():
    model, batches = nn.Sequential(AskingAttention()), [torch.randn(2, 5, 24)]
    modules = dict(model.named_modules())
    assert [site.name for site in find_projections(model, batches=batches)] == ["0.qkv", "0.proj"]
    assert dict(model.named_modules()) == modules
    assert len(replace_projections_(model, batches, SHORT, progress=False).layers) == 2
    model(batches[0])


def test_what_is_read_after_a_projection_s_kind_was_asked_is_seen():
    class LaterAttention(AskingAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.proj.out_features

    batches = [torch.randn(2, 5, 24)]
    assert [site.name for site in find_projections(nn.Sequential(LaterAttention()), batches=batches)] == [
        "0.qkv"
    ]


def test_a_dataloader_that_shuffles_leaves_the_random_state_alone():
    loader = torch.utils.data.DataLoader(torch.randn(8, 5, 24), batch_size=2, shuffle=True)
    found = []
    for seed in (1, 2):
        model = nn.Sequential(SpareAttention())
        nn.init.eye_(model[0].proj.weight), nn.init.zeros_(model[0].proj.bias)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        replace_projections_(model, loader, SHORT, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(state(model))
    mlps = [{name: t for name, t in one.items() if "proj" in name} for one in found]
    assert same(*mlps)


class SpareAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.spare = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_hooks_that_will_not_run_are_warned_of_and_see_no_training():
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    name, seen = "encoder.layer.0.attention.self.query", []
    query = model.get_submodule(name)
    query.register_forward_hook(lambda module, args, output: seen.append(output.dim()))
    with pytest.warns(UserWarning, match=f"^{name}: their hooks will not run"):
        replace_projections_(model, [batch], SHORT, progress=False)
    assert set(seen) == {3}  # of whole calls of the model
    restore_(model)
    assert model.get_submodule(name) is query


def test_projections_that_are_never_called_are_left_out(caplog):
    model, batches = nn.Sequential(SpareAttention()), [torch.randn(2, 5, 24)]
    report = replace_projections_(model, batches, SHORT, progress=False)
    assert [fit.name for fit in report.layers] == ["0.proj"]
    assert "1 projections are not replaced: 0.spare: never called on these batches" in caplog.text
    assert list(projection_mlps(model)) == ["0.proj"]
    with pytest.raises(
        NotImplementedError, match=r"no projection of this Sequential can be replaced: 0\.spare"
    ):
        replace_projections_(
            model, batches, replace(SHORT, filter=lambda name: "spare" in name), progress=False
        )


def test_a_model_that_does_not_run_with_mlps_is_left_as_it_was():
    class LinearAttention(SpareAttention):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.proj, ProjectionMLP):
                raise TypeError("what is this?")
            return super().forward(x)

    model = nn.Sequential(LinearAttention())
    before = state(model)
    with pytest.raises(
        NotImplementedError, match=r"does not run with MLPs .* what is this\?.* ProjectionConfig\(filter"
    ):
        replace_projections_(model, [torch.randn(2, 5, 24)], SHORT, progress=False)
    assert same(state(model), before)
    assert type(model[0].proj) is nn.Linear


def test_a_model_with_an_autocast_of_its_own_is_trained_on_what_its_projections_take():
    """As accelerate prepares it."""
    model, batches = TINY["bert"].model(), [TINY["bert"].batch()]
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    replace_projections_(model, batches, SHORT, progress=False)
    sadmoe.convert_(model, batches, CONVERT, progress=False)
    assert len(moe_layers(model)) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": "zero"}, "start must be one of low_rank, random, got 'zero'"),
        ({"ratio": 0}, "ratio must be above 0, got 0"),
        ({"alpha": float("inf")}, "alpha must be finite, got inf"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"act": "tanh"}, "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"),
        ({"act": "relu2"}, "act='relu2' is not linear for either sign, as start='low_rank' needs it"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ProjectionConfig(**wrong)


def test_an_activation_must_be_known_to_the_mlp_too():
    with pytest.raises(ValueError, match=r"act must be one of .*, got 'tanh'"):
        ProjectionMLP(4, 4, 4, "tanh")


def test_a_damaged_description_is_refused(tmp_path):
    model = TINY["bert"].model()
    name = "encoder.layer.0.attention.self.query"
    for wrong in ({"projection": {"width": 0, "act": "relu"}}, {"projection": {}}):
        with pytest.raises(ValueError, match=name):
            sadmoe.describe.rebuild(model, name, wrong)
    with pytest.raises(ValueError, match="is a linear layer"):
        sadmoe.describe.rebuild(model, "encoder", {"projection": {"width": 4, "act": "relu"}})


def test_a_filter_of_projections_is_a_function():
    with pytest.raises(TypeError, match="filter must be a function of a name, or None, got 'query'"):
        find_projections(TINY["bert"].model(), "query")
