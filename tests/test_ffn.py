"""FFNs of every kind of model: found, read, replaced by an equal MoE layer, and put back bit for bit."""

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import sadmoe.ffn
import torch
import torch.nn.functional as F
from sadmoe import reference
from sadmoe.ffn import (
    ADAPTERS,
    DenseFFN,
    FFNNotFoundError,
    dense_from_layer,
    find_ffns,
    layer_from_dense,
    moe_layers,
    scan_ffns,
    site_from_spec,
    site_of,
    spec,
    swap_activations_,
    swap_in,
    swap_out,
)
from sadmoe.layer import DynamicKMoE
from sites import assert_close, assert_same_state, convert, restore, slots_of, state
from tiny_models import F_, TINY, D, Residual, Tiny, UserFFN, UserGLU, call, hidden, tokens
from torch import Tensor, nn

every_model = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


# Every kind of model


@every_model
def test_finds_what_is_there_and_leaves_it_as_it_was(tiny: Tiny):
    model = tiny.model()
    before, rng = state(model), torch.get_rng_state()
    sites, skipped = scan_ffns(model)
    assert tuple(site.name for site in sites) == tiny.names
    assert not skipped
    for site in sites:
        dense = site.dense()
        assert (site.adapter, site.act) == (tiny.adapter, tiny.act)
        assert (dense.gated, dense.d, dense.d_out, dense.f) == (tiny.gated, tiny.d, tiny.d, tiny.f)
        assert (site.parts.activation is not None) == tiny.swappable
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_state(before, state(model))


@every_model
def test_first_gives_the_input_and_the_pre_activation(tiny: Tiny):
    model = tiny.model()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sites = find_ffns(model)
    for site in sites:
        site.first.register_forward_hook(
            lambda _, args, y, site=site: seen.update({site.name: (args[0], site.pre_activation(y))})
        )
    call(model, tiny.batch())
    for site in sites:
        x, z = seen[site.name]
        dense = site.dense()
        w, b = (dense.w_gate, dense.b_gate) if dense.gated else (dense.w_up, dense.b_up)
        torch.testing.assert_close(z, F.linear(x, w, b))
        assert x.shape[-1] == dense.d


@every_model
def test_converted_at_tau_zero_is_the_dense_model(tiny: Tiny):
    model = tiny.model()
    expected = call(model, tiny.batch())
    convert(model)
    assert tuple(moe_layers(model)) == tiny.names
    assert_close(call(model, tiny.batch()), expected)
    with torch.no_grad():
        assert_close(call(model, tiny.batch()), expected)


@every_model
def test_removed_modules_are_out_of_sight_and_hold_no_memory(tiny: Tiny):
    model = tiny.model()
    removed = [m for site in find_ffns(model) for m in (site.up, site.down, site.first)]
    convert(model)
    assert not {id(m) for m in removed} & {id(m) for m in model.modules()}
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert all(p.is_meta for m in removed for p in m.parameters())
    with pytest.raises(FFNNotFoundError, match=f"{len(tiny.names)} FFNs are converted already"):
        find_ffns(model)


@every_model
def test_restore_is_bit_for_bit(tiny: Tiny):
    model = tiny.model()
    before, expected = state(model), call(model, tiny.batch())
    convert(model)
    restore(model)
    assert_same_state(before, state(model))
    assert torch.equal(call(model, tiny.batch()), expected)
    assert tuple(site.name for site in find_ffns(model)) == tiny.names


@every_model
def test_a_deep_copy_restores_by_itself(tiny: Tiny):
    model = tiny.model()
    before, expected = state(model), call(model, tiny.batch())
    convert(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    restore(twin)
    assert_same_state(before, state(twin), modules=False)
    assert torch.equal(call(twin, tiny.batch()), expected)
    assert tuple(moe_layers(model)) == tiny.names


@every_model
def test_restore_follows_a_cast_of_the_converted_model(tiny: Tiny):
    model = tiny.model()
    expected = {name: t.double() for name, t in model.state_dict().items() if t.is_floating_point()}
    convert(model)
    restore(model.double())
    got = model.state_dict()
    assert all(torch.equal(got[name], t) and got[name].dtype == t.dtype for name, t in expected.items())


@every_model
def test_spec_survives_json_and_finds_the_site_in_a_model_without_weights(tiny: Tiny):
    model = tiny.model()
    expected = call(model, tiny.batch())
    sites = convert(model)
    specs = json.loads(json.dumps({site.name: spec(site) for site in sites}))
    with torch.device("meta"):
        fresh = tiny.build().eval()
    for name, description in specs.items():
        site = site_from_spec(fresh, name, description)
        dense = site.dense()
        assert dense.w_up.is_meta
        layer = layer_from_dense(dense, torch.arange(dense.f, device="meta"), 4, router_width=8)
        swap_in(fresh, site, layer)
        assert spec(site_of(moe_layers(fresh)[name])) == spec(site_of(moe_layers(model)[name]))
    loaded = fresh.to_empty(device="cpu")
    sources = _tensors(model)
    for name, target in _tensors(loaded).items():
        target.copy_(sources[name])
    assert torch.equal(call(loaded, tiny.batch()), call(model, tiny.batch()))
    assert_close(call(restore(loaded), tiny.batch()), expected)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All of them, under all their names: some are tied, some buffers are not in the state dict."""
    named = [model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)]
    return {name: t.detach() for tensors in named for name, t in tensors}


@every_model
def test_activations_swap_and_swap_back(tiny: Tiny):
    model = tiny.model()
    before, expected = state(model), call(model, tiny.batch())
    sites = find_ffns(model)
    if not tiny.swappable and tiny.act != "relu":
        with pytest.raises(NotImplementedError, match=r"is a function called in forward.*make it a module"):
            swap_activations_(model, sites)
        assert_same_state(before, state(model))
        return
    undo = swap_activations_(model, sites)
    assert {site.act for site in sites} == {"relu"}
    assert {site.act for site in find_ffns(model)} == {"relu"}
    swapped = call(model, tiny.batch())
    assert torch.equal(swapped, expected) == (tiny.act == "relu")
    convert(model)
    assert_close(call(model, tiny.batch()), swapped)
    restore(model)
    undo()
    assert_same_state(before, state(model))
    assert torch.equal(call(model, tiny.batch()), expected)
    assert {site.act for site in sites} == {tiny.act}


# What finding does not disturb, and what does not disturb it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_activation(dtype: torch.dtype):
    def gelu_tanh(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    for act, name in ((F.gelu, "gelu"), (gelu_tanh, "gelu_tanh"), (F.silu, "silu"), (F.relu, "relu")):
        (site,) = find_ffns(nn.Sequential(UserFFN(act)).to(dtype))
        assert site.act == name
        assert site.dense().w_up.dtype == dtype


def test_hooks_do_not_fire_and_modes_stay_mixed():
    model = nn.Sequential(UserFFN(nn.GELU()).train(), UserFFN().eval())
    model[0].drop.eval()
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("module"))
    model[0].expand.register_forward_pre_hook(lambda *_: fired.append("linear"))
    before = state(model)
    convert(model)
    assert [layer.training for layer in moe_layers(model).values()] == [True, False]
    restore(model)
    assert not fired
    assert_same_state(before, state(model))
    model(hidden())
    assert fired == ["linear", "module"]


class Positions(nn.Module):
    """Keeps a table of positions in a buffer, how long it is in an attribute, and one by dtype in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 60), nn.ReLU(), nn.Linear(60, D)
        self.register_buffer("table", torch.zeros(99, D), persistent=False)
        self.known = 0
        self.by_device: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.known < x.shape[1]:
            self.known = x.shape[1]
            self.table[: self.known] = torch.arange(self.known).unsqueeze(1) / 10
        if str(x.device) not in self.by_device:
            self.by_device[str(x.device)] = torch.ones(D, dtype=x.dtype)
        x = x + self.table[: x.shape[1]] + self.by_device[str(x.device)]
        return x + self.down(self.act(self.up(x)))


def test_what_a_block_keeps_of_a_call_is_not_kept_of_a_probe():
    block = Positions()
    fresh = copy.deepcopy(block)
    assert [site.name for site in find_ffns(nn.Sequential(block))] == ["0.up"]
    assert (block.known, block.by_device) == (0, {})
    x = hidden()
    assert torch.equal(block(x), fresh(x))


def test_a_scripted_module_beside_an_ffn_is_left_alone():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, 60), torch.jit.script(nn.ReLU()), nn.Linear(60, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.act(self.up(x)))

    model = nn.Sequential(Beside())
    wanted = model(hidden())
    convert(model)
    assert_close(model(hidden()), wanted)


def test_finding_works_under_autocast_and_on_weights_that_share_a_device_context():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        model = nn.Sequential(UserFFN(F.gelu)).to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p)
        assert [site.act for site in find_ffns(model)] == ["gelu"]


def test_restored_modules_follow_the_mode_and_the_gradients_of_the_layer():
    model = nn.Sequential(UserFFN(nn.ReLU()))
    convert(model)
    model.eval().requires_grad_(False)
    restore(model)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_frozen_weights_stay_frozen_both_ways():
    model = nn.Sequential(UserFFN(nn.ReLU()), UserGLU())
    model[0].expand.weight.requires_grad_(False)
    model[1].c.requires_grad_(False)
    before = state(model)
    convert(model)
    plain, gated = moe_layers(model).values()
    assert [plain.w_up.requires_grad, plain.b_up.requires_grad, plain.w_down.requires_grad] == [
        False,
        True,
        True,
    ]
    assert [gated.w_gate.requires_grad, gated.b_gate.requires_grad, gated.w_up.requires_grad] == [
        False,
        False,
        True,
    ]
    restore(model)
    assert_same_state(before, state(model))


def test_training_a_converted_model_carries_over_to_the_restored_one():
    model = nn.Sequential(Residual(UserFFN(nn.GELU())))
    convert(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    expected = model.eval()(hidden())
    restore(model)
    assert_close(model(hidden()), expected)


def test_a_module_with_two_parents_is_one_site_replaced_in_both():
    shared = UserFFN(nn.GELU())
    model = nn.Sequential(Residual(shared), Residual(shared)).eval()
    before, expected = state(model), model(hidden())
    assert [site.name for site in convert(model)] == ["0.inner"]
    assert isinstance(model[1].inner, DynamicKMoE)
    assert model[0].inner is model[1].inner
    assert_close(model(hidden()), expected)
    restore(model)
    assert_same_state(before, state(model))


def test_filter_chooses_by_name():
    model = TINY["sequential"].model()
    assert [site.name for site in find_ffns(model, filter=lambda name: name.startswith("1"))] == ["1.inner"]
    with pytest.raises(FFNNotFoundError, match=r"filter refused all there are:\n  0.inner\n  1.inner"):
        find_ffns(model, filter=lambda name: False)


def test_two_ffns_in_one_block_are_both_found():
    class Macaron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(D, F_), nn.Linear(F_, D), nn.GELU()
            self.c, self.d, self.act2 = nn.Linear(D, F_), nn.Linear(F_, D), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(self.act(self.a(x)))
            return x + self.d(self.act2(self.c(x)))

    model = nn.Sequential(Macaron())
    expected = model(hidden())
    assert [(site.name, site.act) for site in convert(model)] == [("0.a", "gelu"), ("0.c", "relu")]
    assert_close(model(hidden()), expected)


def test_an_activation_hidden_by_an_attribute_is_the_one_that_runs():
    layer = nn.TransformerDecoderLayer(D, 4, F_, activation=nn.GELU(), batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()  # torch's copies of a layer forget a module and run relu
    if "activation" not in model.layers[0].__dict__:
        pytest.skip("this torch copies the activation of a decoder layer")
    expected = model(hidden(), hidden())
    assert [site.act for site in convert(model)] == ["relu"]
    assert_close(model(hidden(), hidden()), expected)


# FFNs whose layers are in modules of their own


class Projected(nn.Module):
    """A linear layer and its activation, as diffusers has them: of a GLU in one, the gate second."""

    def __init__(self, gated: bool):
        super().__init__()
        self.proj, self.gated = nn.Linear(D, 2 * F_ if gated else F_), gated

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(self.proj(x), approximate="tanh")
        up, gate = self.proj(x).chunk(2, dim=-1)
        return up * F.gelu(gate)


class InAList(nn.Module):
    def __init__(self, gated: bool):
        super().__init__()
        self.net = nn.ModuleList([Projected(gated), nn.Dropout(0.0), nn.Linear(F_, D)])

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class GateInside(nn.Module):
    """As CPM-Ant's: two linear layers and the activation in one module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"gate": nn.Linear(D, F_), "up": nn.Linear(D, F_), "act": nn.SiLU()})
        self.out = nn.Linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner["act"](self.inner["gate"](x)) * self.inner["up"](x))


class Wrapped(nn.Module):
    """A linear layer inside a module that adds nothing, as in Gemma 4's towers."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.linear = nn.Linear(n, m)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class OfWrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = Wrapped(D, F_), nn.ReLU(), Wrapped(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    ("make", "adapter", "act"),
    [
        (lambda: InAList(False), "whole_plain", "gelu_tanh"),
        (lambda: InAList(True), "whole_fused", "gelu"),
        (GateInside, "whole_gated", "silu"),
        (OfWrapped, "whole_plain", "relu"),
    ],
    ids=["list", "list of a GLU", "two inside", "wrapped"],
)
def test_layers_in_modules_of_their_own_are_one_ffn(make, adapter, act):
    torch.manual_seed(0)
    model = nn.Sequential(Residual(make()), Residual(make())).eval()
    before, expected = state(model), model(hidden())
    sites = find_ffns(model)
    assert [(site.name, site.adapter, site.act) for site in sites] == [
        ("0.inner", adapter, act),
        ("1.inner", adapter, act),
    ]
    convert(model)
    assert_close(model(hidden()), expected)
    again = nn.Sequential(Residual(make()), Residual(make())).eval()
    for site in sites:
        found = site_from_spec(again, site.name, spec(site))
        assert (found.parts, found.act) == (site.parts, site.act)
    restore(model)
    assert_same_state(before, state(model))


def test_a_module_around_an_ffn_is_not_taken_for_it():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = UserFFN()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.ffn(x)

    sites, skipped = scan_ffns(nn.Sequential(Around(), nn.Sequential(UserFFN())))
    assert [site.name for site in sites] == ["0.ffn", "1.0"]
    assert skipped == []


# Dropout


def test_hidden_dropout_that_is_called_as_a_function_goes_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=50, d_model=D, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=F_, decoder_ffn_dim=F_,
        encoder_attention_heads=2, decoder_attention_heads=2, activation_dropout=0.5, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BartModel(config)
    block = model.encoder.layers[0]
    dense = block.eval()(hidden(), None)
    for site in find_ffns(model):
        swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert block.activation_dropout == 0.0
    assert_close(block.train()(hidden(), None), dense)
    for name in list(moe_layers(model)):
        swap_out(model, name)
    assert block.activation_dropout == 0.5


class OneProbability(nn.Module):
    """Drops its neurons and its output with one probability."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.dropout = nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D), 0.5
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.act(self.fc1(self.norm(x))), self.dropout, self.training)
        return x + F.dropout(self.fc2(h), self.dropout, self.training)


def test_a_probability_of_the_output_too_stays():
    model = nn.Sequential(OneProbability())
    (site,) = find_ffns(model)
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert model[0].dropout == 0.5


def test_output_dropout_moves_into_the_layer_and_hidden_dropout_goes():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Dropout(0.9), nn.Linear(F_, D), nn.Dropout(0.25)),
        nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Dropout(0.9), nn.Linear(F_, D)),
    )
    assert [site.dropout for site in find_ffns(model)] == [0.25, 0.0]
    convert(model)
    first, second = moe_layers(model).values()
    assert second.dropout is None
    (dropout,) = (module for module in model.modules() if isinstance(module, nn.Dropout))
    x = torch.ones(64, D)
    assert not (first.eval()(x) == 0).any()
    dropout.train()
    assert (first(x) == 0).any(), "where a user leaves dropouts on"
    dropout.p = 0.0
    assert torch.equal(first.train()(x), first.eval()(x)), "where a user takes them away"
    dropout.p = 0.25
    assert [dense_from_layer(layer).dropout for layer in moe_layers(model).values()] == [0.25, 0.0]


def test_dropout_called_as_a_function_is_seen_too():
    class Functional(UserFFN):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.expand(x)), 0.4, self.training)
            return F.dropout(self.contract(x), p=0.125, training=self.training)

    assert [site.dropout for site in find_ffns(nn.Sequential(Functional()))] == [0.125]


@pytest.mark.parametrize("norm_first", [False, True])
def test_only_the_dropouts_of_the_output_are_left_in_a_block(norm_first: bool):
    layer = nn.TransformerEncoderLayer(D, 4, F_, dropout=0.5, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(layer)
    convert(model)
    assert isinstance(layer.dropout, nn.Identity)
    assert isinstance(layer.dropout1, nn.Dropout)
    assert isinstance(layer.dropout2, nn.Dropout)
    restore(model)
    assert isinstance(layer.dropout, nn.Dropout)


# torch's own transformer: its fast paths read the weights of linear1


def _encoder(**kw: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 4, F_, batch_first=True, dropout=0.0, **kw)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("only", ["", "layers.0", "layers.1"])
def test_torch_encoder_keeps_its_output_on_every_path(mode: str, padded: bool, only: str):
    model = _encoder().train(mode == "train")
    padding = torch.arange(7) >= torch.tensor([[7], [4]]) if padded else None

    def real_tokens() -> Tensor:
        with torch.set_grad_enabled(mode != "eval without gradients"):
            y = model(hidden(), src_key_padding_mask=padding)
        return y if padding is None else y[~padding]

    expected = real_tokens()
    convert(model, filter=lambda name: name.startswith(only))
    assert not model.use_nested_tensor
    assert_close(real_tokens(), expected)
    restore(model)
    assert model.use_nested_tensor
    assert torch.equal(real_tokens(), expected)


def test_torch_encoder_gets_its_nested_tensors_back_only_with_its_last_layer():
    model = _encoder()
    convert(model)
    for name in ("layers.0.linear1", "layers.1.linear1"):
        assert not model.use_nested_tensor
        swap_out(model, name)
    assert model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]


def test_torch_layer_swapped_to_relu_takes_the_fast_path_of_relu():
    model = nn.Sequential(nn.TransformerEncoderLayer(D, 4, F_, activation="gelu", batch_first=True)).eval()
    undo = swap_activations_(model, find_ffns(model))
    assert model[0].activation_relu_or_gelu == 1
    with torch.no_grad():
        fast = model(hidden())
    assert_close(fast, model(hidden()))
    undo()
    assert model[0].activation_relu_or_gelu == 2


# The FFN as a value


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_layer_and_dense_are_inverse(act: str, gated: bool):
    g = torch.Generator().manual_seed(0)
    f, d, d_out = 30, 7, 5
    extra = {"w_gate": torch.randn(f, d, generator=g), "b_gate": torch.randn(f, generator=g)} if gated else {}
    dense = DenseFFN(
        act,
        w_up=torch.randn(f, d, generator=g),
        w_down=torch.randn(f, d_out, generator=g),
        b_out=torch.randn(d_out, generator=g),
        dropout=0.1,
        trainable=frozenset({"w_down"}),
        **extra,
    )
    layer = layer_from_dense(dense, torch.randperm(f, generator=g), 5, router_width=3)
    x = torch.randn(4, d, generator=g)
    assert_close(layer.eval()(x), dense(x))
    back = dense_from_layer(layer)
    for name in ("w_up", "w_down", "b_up", "w_gate", "b_gate", "b_out"):
        a, b = getattr(dense, name), getattr(back, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert (back.act, back.dropout, back.trainable) == (dense.act, dense.dropout, dense.trainable)
    assert torch.equal(layer.w_up.flatten(0, 1), dense.w_up[layer.permutation])


def test_dense_checks_its_shapes():
    w = torch.zeros(6, 4)
    with pytest.raises(
        ValueError, match=r"act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"
    ):
        DenseFFN("tanh", w, w)
    with pytest.raises(
        ValueError, match=r"w_up must be \[f, d\] and w_down \[f, d_out\], got \[6\] and \[6, 4\]"
    ):
        DenseFFN("relu", w[:, 0], w)
    with pytest.raises(ValueError, match=r"w_down must be \[6, 4\] beside w_up \[6, 4\], got \[5, 4\]"):
        DenseFFN("relu", w, w[1:])
    with pytest.raises(ValueError, match=r"b_up must be \[6\] beside w_up \[6, 4\], got \[4\]"):
        DenseFFN("relu", w, w, b_up=w[0])
    with pytest.raises(ValueError, match="b_gate needs w_gate, got b_gate alone"):
        DenseFFN("relu", w, w, b_gate=w[:, 0])


def test_layer_from_dense_checks_experts_and_slots():
    dense = DenseFFN("relu", torch.zeros(6, 4), torch.zeros(6, 4))
    with pytest.raises(
        ValueError, match=r"experts must divide the 6 neurons of the FFN, got 4; these do: 1, 2, 3, 6"
    ):
        layer_from_dense(dense, torch.arange(6), 4)
    with pytest.raises(ValueError, match=r"slots must be int64 \[6\], got torch.float32 \[6\]"):
        layer_from_dense(dense, torch.arange(6.0), 3)
    with pytest.raises(ValueError, match="slots must hold each of the neurons 0 to 5 once"):
        layer_from_dense(dense, torch.zeros(6, dtype=torch.int64), 3)


# Surgery and specs refuse what does not fit, and change nothing


def test_swap_in_refuses_a_layer_of_another_shape_and_a_site_of_another_model():
    model = nn.Sequential(UserFFN(nn.ReLU()))
    before = state(model)
    (site,) = find_ffns(model)
    wrong = DynamicKMoE(D, 4, 15, "gelu", bias=("b_up",))
    with pytest.raises(ValueError, match=r"0: the layer does not fit: the FFN is relu .*the layer gelu"):
        swap_in(model, site, wrong)
    layer = layer_from_dense(site.dense(), slots_of(site), 4)
    with pytest.raises(ValueError, match=r"0: the site is not in this model, or was converted since"):
        swap_in(nn.Sequential(UserFFN(nn.ReLU())), site, layer)
    assert_same_state(before, state(model))
    swap_in(model, site, layer)
    with pytest.raises(ValueError, match="was converted since"):
        swap_in(model, site, layer)


def test_swap_out_knows_only_what_swap_in_put_there():
    model = nn.Sequential(DynamicKMoE(D, 4, 15, "relu"))
    with pytest.raises(ValueError, match=r"0: convert_ or load did not put it there"):
        swap_out(model, "0")
    with pytest.raises(ValueError, match=r"the layer: convert_ or load did not put it there"):
        site_of(model[0])
    with pytest.raises(ValueError, match=r"'x' is no MoE layer of this model; these are: 0"):
        swap_out(model, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "tanh"}, "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"),
        ({"more": 1}, "spec must be a dict with act, activation, adapter, at, down"),
        ({"up": None}, "spec is damaged at up = None"),
        ({"removed": "expand"}, "spec is damaged at removed = 'expand'"),
        ({"gate_half": "third"}, "spec is damaged at gate_half = 'third'"),
        ({"adapter": 3}, "spec is damaged at adapter = 3"),
        ({"dropout": 2.0}, "spec is damaged at dropout = 2.0"),
        ({"at": "fc1"}, "the name must end with 'fc1'"),
        ({"up": "missing"}, "not in this Sequential, which is not the model saved"),
        ({"removed": ["missing"]}, "not in this Sequential, which is not the model saved"),
        ({"up": "drop"}, "up, drop, is no linear layer"),
        ({"gate": "contract"}, r"linear layers .* make no FFN"),
    ],
)
def test_a_damaged_or_foreign_spec_is_refused(change: dict[str, Any], message: str):
    model = nn.Sequential(UserFFN(nn.ReLU()))
    good = spec(find_ffns(model)[0])
    assert site_from_spec(model, "0", good).act == "relu"
    with pytest.raises(ValueError, match=message):
        site_from_spec(model, "0", good | change)
    with pytest.raises(ValueError, match="spec must be a dict"):
        site_from_spec(model, "0", [good])


# The ReLU swap, in transformers' configs


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5 v1.1", "gemma", "albert"])
def test_config_follows_so_that_a_saved_dense_model_reloads_alike(name: str, tmp_path: Any):
    tiny = TINY[name]
    model = tiny.model()
    model.save_pretrained(tmp_path)
    before = model.config.to_json_string()
    undo = swap_activations_(model, find_ffns(model))
    expected = call(model, tiny.batch())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {site.act for site in find_ffns(loaded)} == {"relu"}
    assert torch.equal(call(loaded, tiny.batch()), expected)
    undo()
    assert model.config.to_json_string() == before


def test_t5_config_tells_the_gelus_apart(tmp_path: Any):
    model = TINY["t5 v1.1"].model()
    swap_activations_(model, find_ffns(model), "gelu")
    model.save_pretrained(tmp_path)
    assert {site.act for site in find_ffns(type(model).from_pretrained(tmp_path))} == {"gelu"}


def test_config_stays_where_something_else_uses_its_activation(caplog: pytest.LogCaptureFixture):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "intermediate_size": F_, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes))
    undo = swap_activations_(model, find_ffns(model))
    assert model.config.hidden_act == "gelu"
    assert (
        "the config keeps hidden_act=gelu, as cls.predictions.transform.transform_act_fn uses it too"
        in caplog.text
    )
    undo()
    caplog.clear()
    model = TINY["bert"].model()
    swap_activations_(model, find_ffns(model, filter=lambda name: "layer.0" in name))
    assert model.config.hidden_act == "gelu"
    assert "encoder.layer.1.intermediate.intermediate_act_fn uses it too" in caplog.text


def test_swap_wants_an_activation_it_knows():
    model = nn.Sequential(UserFFN(nn.GELU()))
    with pytest.raises(
        ValueError, match="act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'mish'"
    ):
        swap_activations_(model, find_ffns(model), "mish")


# Everything at once


def test_a_bert_inside_another_model_takes_its_spec_along():
    tiny = TINY["bert"]
    model = tiny.model()
    specs = {site.name: spec(site) for site in find_ffns(model)}
    whole = nn.ModuleDict({"bert": model})
    for name, description in specs.items():
        assert (
            site_from_spec(whole, f"bert.{name}", description).up
            is site_from_spec(model, name, description).up
        )


def test_every_adapter_has_a_model():
    assert {tiny.adapter for tiny in TINY.values()} == set(ADAPTERS) - {"projection"}  # see test_attention


def test_padded_text_converts_like_any_other():
    tiny = TINY["bert"]
    model = tiny.model()
    expected = call(model, tokens())
    convert(model, experts=60)
    assert_close(call(model, tokens()), expected)


def test_no_model_library_is_imported():
    for path in Path(sadmoe.ffn.__file__).parent.glob("*.py"):
        imports = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        roots = {alias.name.split(".")[0] for n in imports for alias in n.names if isinstance(n, ast.Import)}
        roots |= {str(n.module).split(".")[0] for n in imports if isinstance(n, ast.ImportFrom)}
        assert not roots & {"transformers", "timm", "torchvision"}, path.name
