"""FFNs in blocks that do more: layers in modules of their own, dropout, nn.TransformerEncoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sadmoe.ffn import (
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
from sites import assert_close, assert_same_state, convert, restore, slots_of, state
from tiny_models import F_, D, Residual, UserFFN, call, hidden
from torch import Tensor, nn


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


def test_hidden_dropout_that_is_called_as_a_function_goes_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=50, d_model=D, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=F_, decoder_ffn_dim=F_,
        encoder_attention_heads=2, decoder_attention_heads=2, activation_dropout=0.5, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BartModel(config)
    block = model.encoder.layers[0]
    dense = call(block.eval(), (hidden(), None))
    for site in find_ffns(model):
        swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert block.activation_dropout == 0.0
    assert_close(call(block.train(), (hidden(), None)), dense)
    specs = {name: spec(site_of(layer)) for name, layer in moe_layers(model).items()}
    for name in list(moe_layers(model)):
        swap_out(model, name)
    assert block.activation_dropout == 0.5

    block.activation_dropout = 0  # as a config may say it
    for name, found in specs.items():
        site = site_from_spec(model, name, found)
        swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert_close(call(block.train(), (hidden(), None)), dense)
    for name in list(moe_layers(model)):
        swap_out(model, name)
    assert block.activation_dropout == 0


class OneProbability(nn.Module):
    """Drops its neurons and its output with one probability."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.dropout = nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D), 0.5
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.act(self.fc1(self.norm(x))), self.dropout, self.training)
        return x + F.dropout(self.fc2(h), self.dropout, self.training)


class Drop(nn.Module):
    """A dropout of another class than torch's, as fairseq's."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class DropsHidden(nn.Module):
    """A block in which dropout acts on the neurons."""

    def __init__(self, drop: nn.Module):
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(D), nn.Linear(D, F_), nn.ReLU()
        self.drop, self.fc2 = drop, nn.Linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(self.norm(x)))))


@pytest.mark.parametrize(
    "drop", [nn.Dropout(0.5), nn.AlphaDropout(0.5), Drop(0.5)], ids=lambda d: type(d).__name__
)
def test_hidden_dropout_of_any_class_goes(drop):
    model = nn.Sequential(DropsHidden(drop)).eval()
    wanted = model(hidden())
    for site in find_ffns(model):
        swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert_close(model.train()(hidden()), wanted)
    (name,) = moe_layers(model)
    swap_out(model, name)
    assert model[0].drop is drop


class DropsOutput(nn.Module):
    """A dropout of another class, which no call of F.dropout tells of in evaluation mode, as fairseq's."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.training else x


@pytest.mark.parametrize("drop", [nn.AlphaDropout(0.5), DropsOutput(0.5)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("place", ["before", "after"])
def test_dropout_around_an_ffn_is_not_lost(drop, place):
    ffn = [nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D)]
    model = nn.Sequential(nn.Sequential(*([drop, *ffn] if place == "before" else [*ffn, drop]))).eval()
    wanted = model(hidden())
    (site,) = find_ffns(model)
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert_close(model(hidden()), wanted)
    assert drop in model.modules()
    assert not torch.allclose(model.train()(hidden()), wanted)


@pytest.mark.parametrize("place", ["input", "output"])
@pytest.mark.parametrize("drop", [torch.dropout, F.dropout1d, F.alpha_dropout])
def test_dropout_that_is_called_by_another_name_is_not_lost(drop, place):
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, F_), nn.Linear(F_, D)

        def forward(self, x: Tensor) -> Tensor:
            if place == "input":
                return self.down(F.relu(self.up(drop(x, 0.5, self.training))))
            return drop(self.down(F.relu(self.up(x))), 0.5, self.training)

    model = nn.Sequential(Dropping()).eval()
    if place == "output" and drop is torch.dropout:
        assert find_ffns(model)[0].dropout == 0.5
        return
    with pytest.raises(
        NotImplementedError, match=rf"it has .*dropout on its {place}.*, which a MoE layer does not"
    ):
        find_ffns(model)


def test_an_activation_under_two_names_is_swapped():
    class TwoNames(UserFFN):
        def __init__(self) -> None:
            super().__init__(nn.GELU())
            self.again = self.nonlinearity

    (site,) = find_ffns(nn.Sequential(TwoNames()))
    assert site.parts.activation == "nonlinearity"


class Half(nn.Module):
    """One linear layer, and all that is done to the neurons, as in BERT."""

    def __init__(self, drop: nn.Module | None):
        super().__init__()
        self.dense, self.act, self.drop = nn.Linear(D, F_), nn.GELU(), drop

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dense(x))
        return F.dropout(x, 0.3, self.training) if self.drop is None else self.drop(x)


class OtherHalf(nn.Module):
    def __init__(self, p: float = 0.0):
        super().__init__()
        self.dense, self.dropout = nn.Linear(F_, D), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x))


class SideBySide(nn.Module):
    """Two FFNs in turns, as in LXMERT: the dropout of one's output runs between the linear layers of the other."""

    def __init__(self):
        super().__init__()
        self.lang_inter, self.visn_inter = Half(nn.Identity()), Half(nn.Identity())
        self.lang_output, self.visn_output = OtherHalf(0.5), OtherHalf(0.5)

    def forward(self, x: Tensor) -> Tensor:
        of_language, of_images = self.lang_inter(x), self.visn_inter(x)
        return x + self.lang_output(of_language) + self.visn_output(of_images)


def test_dropout_on_the_output_of_an_ffn_beside_stays():
    model = nn.Sequential(SideBySide())
    for site in find_ffns(model):
        swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert len(moe_layers(model)) == 2
    for half in (model[0].lang_output, model[0].visn_output):
        assert isinstance(half.dropout, nn.Dropout)


class Halves(nn.Module):
    def __init__(self, drop: nn.Module | None):
        super().__init__()
        self.intermediate, self.output = Half(drop), OtherHalf()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output(self.intermediate(x))


@pytest.mark.parametrize("drop", [nn.Dropout(0.3), None], ids=["module", "function"])
def test_hidden_dropout_that_goes_with_its_half_is_not_warned_of(drop, caplog):
    model = nn.Sequential(Halves(drop))
    (site,) = find_ffns(model)
    assert caplog.text == ""
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    x = hidden()
    assert torch.equal(model.train()(x), model(x))


def test_hidden_dropout_that_cannot_be_told_is_warned_of(caplog):
    class CallsDropout(DropsHidden):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.dropout(self.act(self.fc1(self.norm(x))), 0.3, self.training))

    with caplog.at_level("WARNING"):
        for _ in range(2):
            caplog.clear()
            model = nn.Sequential(CallsDropout(nn.Identity()), CallsDropout(nn.Identity()))
            assert len(find_ffns(model)) == 2
            assert "2 FFNs call F.dropout between their linear layers" in caplog.text
        caplog.clear()
        find_ffns(model, lambda name: name.startswith("0"))
        assert "1 FFNs call" in caplog.text
        caplog.clear()
        scan_ffns(model)
    assert caplog.text == ""


def test_one_activation_in_several_places_of_a_sequential_is_that_of_each():
    act = nn.ReLU()
    several = [nn.Linear(D, F_), act, nn.Linear(F_, D), act, nn.Linear(D, F_), act, nn.Linear(F_, D)]
    model = nn.Sequential(nn.Sequential(*several))
    before, wanted = state(model), model(hidden())
    sites = find_ffns(model)
    assert [site.parts.activation for site in sites] == ["1", "5"]
    undo = swap_activations_(model, sites[:1], "silu")
    assert model[0][5] is act is not model[0][1]
    undo()
    convert(model)
    assert_close(model(hidden()), wanted)
    restore(model)
    assert_same_state(before, state(model))


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


def test_an_ffn_that_tells_its_own_sizes_keeps_its_activation():
    class Sized(UserFFN):
        def __init__(self):
            super().__init__(nn.GELU())
            self.in_features = self.out_features = D

    (site,) = find_ffns(nn.Sequential(nn.LayerNorm(D), Sized()))
    assert (site.act, site.parts.activation) == ("gelu", "nonlinearity")
