"""What is no FFN, and what is one that cannot be converted: named, with the reason, and left alone."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from sadmoe.ffn import (
    FFNNotFoundError,
    ProjectionMLP,
    find_ffns,
    layer_from_dense,
    overlooked,
    probe,
    scan_ffns,
    site_from_spec,
    spec,
    swap_in,
)
from sites import Reasons, reason, slots_of
from tiny_models import F_, TINY, D, Scaled, UserFFN, UserGLU
from torch import Tensor, nn


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 5)),
        nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, 5)),
        nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)),
        nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D)),
        nn.MultiheadAttention(D, 4),
    ],
    ids=["classifier", "projection", "square", "bottleneck", "attention"],
)
def test_heads_bottlenecks_and_attention_are_not_ffns(head: nn.Module):
    assert scan_ffns(nn.Sequential(UserFFN(), head))[1] == []
    assert [site.name for site in find_ffns(nn.Sequential(UserFFN(), head))] == ["0"]
    with pytest.raises(FFNNotFoundError, match="no FFN found in this Sequential"):
        find_ffns(nn.Sequential(head))


def test_attention_wider_than_the_model_is_not_an_ffn():
    model = TINY["qwen3"].model()
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.in_features > attention.o_proj.out_features == D
    assert tuple(site.name for site in find_ffns(model)) == TINY["qwen3"].names


class SharedAttention(nn.Module):
    """Queries twice as wide as the model, keys and values those of another layer, as in Gemma 4."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_norm, self.o_proj = nn.Linear(D, 2 * D), nn.LayerNorm(D), nn.Linear(2 * D, D)
        self.softmax = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.softmax(self.q_proj(x)))


def test_attention_that_looks_like_an_ffn_is_not_named_as_one():
    assert scan_ffns(nn.Sequential(UserFFN(), SharedAttention()))[1] == []


def test_nothing_found_lists_the_linear_layers():
    with pytest.raises(FFNNotFoundError, match=r"d -> f and f -> d, f > d.*Seen:\n  0 \(Linear\): 24 -> 5"):
        find_ffns(nn.Sequential(nn.Linear(D, 5)))
    with pytest.raises(FFNNotFoundError, match="it has no linear layers"):
        find_ffns(nn.Sequential(nn.ReLU()))
    with pytest.raises(FFNNotFoundError, match=r"\.\.\. and 8 more"):
        find_ffns(nn.Sequential(*(nn.Linear(D, 5) for _ in range(20))))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        find_ffns("bert")


def test_a_mixture_of_experts_already_is_named_as_one():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "intermediate_size": F_, "num_hidden_layers": 1, "vocab_size": 50}
    config = transformers.MixtralConfig(
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, **sizes
    )
    with pytest.raises(
        FFNNotFoundError, match=r"mlp\.experts \(MixtralExperts\).*a mixture of experts already"
    ):
        find_ffns(transformers.MixtralModel(config))
    attention = nn.Linear(D, D)
    attention.r_kernel = nn.Parameter(torch.zeros(D, 4, 6))  # Funnel's, of relative positions
    with pytest.raises(FFNNotFoundError) as found:
        find_ffns(nn.Sequential(attention))
    assert "experts" not in str(found.value)
    experts = nn.ModuleDict({"experts": nn.ModuleList([UserFFN(), UserFFN()])})
    with pytest.raises(NotImplementedError, match=r"experts\.0 \(UserFFN\): it is an expert of a mixture"):
        find_ffns(experts)


class _Cubed(UserFFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x)) ** 3)


class _TwoInputs(UserFFN):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.contract(F.relu(self.expand(x)))


class _Dictionary(UserFFN):
    def forward(self, x: Tensor) -> Any:
        return {"y": self.contract(F.relu(self.expand(x)))}


class _Pair(UserFFN):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class _Normed(UserFFN):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.inner_norm = nn.LayerNorm(F_)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.inner_norm(self.nonlinearity(self.expand(x))))


class _GatedNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F_), nn.Linear(D, F_), nn.Linear(F_, D)
        self.act, self.sub_norm = nn.SiLU(), nn.LayerNorm(F_)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.sub_norm(self.act(self.gate(x)) * self.up(x)))


class _Transposed(UserFFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x))).transpose(0, 1)


class _Inline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.expand, self.contract = nn.LayerNorm(D), nn.Linear(D, F_), nn.Linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.relu(self.expand(self.norm(x))))


class _Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _with(change: Callable[[UserFFN], Any]) -> UserFFN:
    ffn = UserFFN(nn.ReLU())
    change(ffn)
    return ffn


def _parametrise(ffn: UserFFN) -> None:
    nn.utils.parametrizations.weight_norm(ffn.expand)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (
            lambda: UserFFN(nn.Tanh()),
            "its activation, nonlinearity (Tanh), is none of relu, gelu, gelu_tanh, silu",
        ),
        (lambda: UserFFN(nn.ReLU6()), "its activation, nonlinearity (ReLU6), is none of"),
        (lambda: UserFFN(nn.PReLU()), "its activation, nonlinearity (PReLU), is none of"),
        (lambda: UserFFN(F.mish), "it does not compute down(act(up(x))) or its gated form: off by"),
        (_Cubed, "it does not compute down(act(up(x)))"),
        (_TwoInputs, "run on a probe [1, 8, 24] it raised TypeError"),
        (_Dictionary, "it returns a dict, where a MoE layer returns a tensor"),
        (_Pair, "it returns a tuple, where a MoE layer returns a tensor"),
        (_Normed, "inner_norm (LayerNorm) works on its 60 neurons, which only an activation may"),
        (
            _GatedNormed,
            "): sub_norm (LayerNorm) works on its 60 neurons, which only an activation may; run on",
        ),
        (_Transposed, "its output is [8, 1, 24] where that of the FFN would make [1, 8, 24]"),
        (
            _Inline,
            "expand and contract have the shapes of an FFN, but its activation is none of relu, gelu, gelu_tanh, silu, "
            "quick_gelu, relu2, or is no module and no attribute of this one",
        ),
        (lambda: _with(lambda m: m.to("meta")), "its weights are on the meta device, so it cannot be run"),
        (
            lambda: _with(lambda m: m.expand.bfloat16()),
            "of several kinds (torch.bfloat16 on cpu, torch.float32 on",
        ),
        (
            lambda: _with(lambda m: setattr(m, "expand", _Shifted(D, F_))),
            "it does not compute down(act(up(x)))",
        ),
        (
            lambda: _with(lambda m: setattr(m, "expand", Scaled(D, F_))),
            "expand is a Scaled that holds scale too; only nn.Linear",
        ),
        (lambda: _with(_parametrise), "expand is a ParametrizedLinear that something wraps or parametrises"),
        (
            lambda: _with(lambda m: setattr(m.expand, "forward", partial(m.expand.forward))),
            "expand is a Linear that something wraps",
        ),
        (
            lambda: _with(lambda m: setattr(m.expand, "weight", nn.Parameter(m.expand.weight.int(), False))),
            "expand has a weight of type Parameter and dtype torch.int32, not a float nn.Parameter",
        ),
    ],
)
def test_what_cannot_be_converted_says_why(inner: Callable[[], nn.Module], expected: str):
    assert expected in reason(inner())


class _OfTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x[..., :1]) < 0.5) if self.training else x


class _DropPath(UserFFN):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.drop_path = F.relu, _OfTraining()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.contract(self.act(self.expand(x))))


class _DropPathGLU(UserGLU):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.drop_path = F.silu, _OfTraining()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(super().forward(x))


class TimeShifted(UserFFN):
    """RWKV's: its activation is called as a function, beside a module that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.time_shift, self.receptance = nn.ZeroPad2d((0, 0, 1, -1)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.receptance(x).sigmoid() * self.contract(self.expand(self.time_shift(x)).relu().square())


def test_what_is_no_activation_is_not_blamed_for_one():
    with pytest.raises(NotImplementedError, match="or is no module and no attribute of this one"):
        find_ffns(nn.Sequential(TimeShifted()))


class TwoPairs(nn.Module):
    """LXMERT's and Q-Former's: two FFNs of one shape over four children."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("lang", "visn"):
            setattr(self, f"{name}_inter", nn.Sequential(nn.Linear(D, F_), nn.ReLU()))
            setattr(self, f"{name}_output", nn.Sequential(nn.Linear(F_, D), nn.Dropout()))

    def forward(self, lang: Tensor, visn: Tensor) -> Tensor:
        lang = lang + self.lang_output(self.lang_inter(lang))
        return lang + visn + self.visn_output(self.visn_inter(visn))


@pytest.mark.parametrize("only", ["lang", "visn"])
def test_a_filter_joins_no_halves_of_two_ffns(only):
    block = TwoPairs()
    (site,) = find_ffns(nn.Sequential(block), lambda name: only in name)
    assert site.name == f"0.{only}_inter"
    assert site.down is getattr(block, f"{only}_output")[0]


def test_a_gate_is_not_guessed_where_the_output_says_nothing():
    ffn = UserGLU()
    nn.init.zeros_(ffn.a.weight)
    with pytest.raises(NotImplementedError, match="so its gate cannot be told"):
        find_ffns(nn.Sequential(ffn))


class OverlookedFeedForward(nn.Module):
    """Of three widths."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out, self.last = nn.Linear(D, F_), nn.Linear(F_, 30), nn.Linear(30, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(self.inside(x).relu()).relu())


def test_what_is_named_as_an_ffn_is_not_left_out_without_a_word(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(UserFFN(), OverlookedFeedForward(), nn.Linear(D, 3))
    with caplog.at_level(logging.WARNING):
        assert [site.name for site in find_ffns(model)] == ["0"]
    seen = "inside 24 -> 60, out 60 -> 30, last 30 -> 24"
    said = f"  1 (OverlookedFeedForward): none of its linear layers, {seen}, are seen as d -> f and f -> d, f"
    assert f"1 FFN is not converted:\n{said}" in caplog.text
    caplog.clear()
    find_ffns(model, lambda name: name == "0")
    assert caplog.text == ""


class ConvMlp(nn.Module):
    """An FFN by convolutions of width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv1d(7, 14, 1), nn.ReLU(), nn.Conv1d(14, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def test_convolutions_of_width_1_are_named_beside_ffns_that_are_found(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(UserFFN(), ConvMlp())
    with caplog.at_level(logging.WARNING):
        assert [site.name for site in find_ffns(model)] == ["0"]
    assert (
        "1 (ConvMlp): none of its linear layers, fc1 7 -> 14 (a convolution, which is not read)"
        in caplog.text
    )
    assert [one.name for one in overlooked(model, *scan_ffns(model))] == ["1"]
    model[1].fc1 = nn.Conv1d(7, 14, 1, groups=7)
    assert overlooked(model, *scan_ffns(model)) == []


def test_what_acts_in_training_alone_is_not_lost():
    model = nn.Sequential(_DropPath())
    (site,) = find_ffns(model)
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 6, 4))
    assert isinstance(model[0].drop_path, _OfTraining)
    assert "drop_path (_OfTraining) in it may do in training what a MoE layer would not" in reason(
        _DropPathGLU()
    )


def test_advice_fits_the_module():
    told = reason(UserFFN(F.mish))
    assert "put the FFN in a module of its own" not in told, "it is in one"
    assert "put the FFN in a module of its own" in reason(_Inline())


def test_zero_output_weights_hide_a_functional_activation_only():
    def zeroed(act: Any) -> UserFFN:
        ffn = UserFFN(act)
        nn.init.zeros_(ffn.contract.weight)
        return ffn

    assert "its output weights are all zero, so its activation cannot be told" in reason(zeroed(F.gelu))
    assert [site.act for site in find_ffns(Reasons(zeroed(nn.GELU())))] == ["gelu"]


def test_a_scripted_ffn_leaves_the_others_to_be_found():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D)))
    plain = nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D))
    assert [site.name for site in find_ffns(nn.Sequential(scripted, plain))] == ["1"]
    with pytest.raises(
        NotImplementedError, match=r"it is scripted; convert the module that torch\.jit\.script"
    ):
        find_ffns(nn.Sequential(scripted))


def test_convolutions_are_no_mixture_of_experts():
    with pytest.raises(FFNNotFoundError) as found:
        find_ffns(nn.Sequential(nn.Conv1d(D, F_, 1), nn.ReLU(), nn.Conv1d(F_, D, 1)))
    assert "mixture" not in str(found.value)


def test_no_more_are_positions_and_scales():
    model = nn.Sequential(nn.Linear(D, D))
    model.cls_token, model.scale = nn.Parameter(torch.ones(1, 1, D)), nn.Parameter(torch.ones(D, 1, 1))
    with pytest.raises(FFNNotFoundError) as found:
        find_ffns(model)
    assert "mixture" not in str(found.value)


def test_a_model_that_is_itself_the_ffn_has_to_be_wrapped():
    with pytest.raises(NotImplementedError, match=r"wrap it: nn\.Sequential\(ffn\)"):
        find_ffns(UserGLU())
    ffn = UserGLU()
    (inner,) = find_ffns(nn.Sequential(ffn))
    assert inner.name == "0"
    site = site_from_spec(ffn, "", spec(inner))
    layer = layer_from_dense(site.dense(), slots_of(site), 4)
    with pytest.raises(ValueError, match=r"wrap it: nn\.Sequential\(ffn\)"):
        swap_in(ffn, site, layer)


def test_ffns_left_out_beside_others_are_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert [site.name for site in find_ffns(nn.Sequential(UserFFN(), UserFFN(nn.Tanh())))] == ["0"]
    assert "1 FFN is not converted:\n  1 (UserFFN): its activation, nonlinearity (Tanh)" in caplog.text


def test_three_linear_layers_that_are_no_glu_are_named_too():
    class Deep(UserFFN):
        def __init__(self) -> None:
            super().__init__(nn.ReLU6())
            self.out = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(super().forward(x))

    assert "its activation, nonlinearity (ReLU6), is none of" in reason(Deep())


def test_what_the_filter_takes_is_converted_already():
    model = nn.Sequential(UserFFN(), UserFFN())
    (site, _) = find_ffns(model)
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 4))
    with pytest.raises(FFNNotFoundError, match="1 FFNs are converted already; to convert them anew"):
        find_ffns(model, "0".__eq__)
    with pytest.raises(FFNNotFoundError, match=r"the filter \(--only\) refused all there are:\n  1"):
        find_ffns(model, "2".__eq__)


def test_a_filter_must_be_a_function():
    with pytest.raises(TypeError, match="filter must be a function of a name, or None, got 'encoder'"):
        find_ffns(nn.Sequential(UserFFN()), "encoder")


def test_dropout_of_the_input_is_refused():
    inner = nn.Sequential(nn.Dropout(0.1), nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D))
    (site,) = find_ffns(Reasons(inner))
    assert site.adapter == "in_block"  # so the dropout stays where it is

    class Inside(UserFFN):
        def forward(self, x: Tensor) -> Tensor:
            return self.contract(F.relu(self.expand(self.drop(x))))

    assert "it has a dropout on its input" in reason(Inside())


def test_an_mlp_of_attention_with_another_activation_says_which():
    mlp = ProjectionMLP(D, F_, D)
    mlp.act = nn.Hardswish()
    with pytest.raises(NotImplementedError, match=r"its activation, act \(Hardswish\), is none of"):
        find_ffns(nn.Sequential(mlp))


def test_a_lack_of_memory_is_no_reason_against_an_ffn(monkeypatch):
    def lacks(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "_run", lacks)
    with pytest.raises(torch.OutOfMemoryError):
        scan_ffns(nn.Sequential(UserFFN()))


def test_a_module_that_keeps_what_it_is_given_keeps_nothing_of_the_search():
    class Recorder(nn.Module):
        calls, seen = 0, None

        def forward(self, x):
            self.calls, self.seen = self.calls + 1, x
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D)
            self.recorder = Recorder()

        def forward(self, x):
            return self.down(self.act(self.up(self.recorder(x))))

    model = nn.Sequential(Block())
    find_ffns(model)
    assert (model[0].recorder.calls, model[0].recorder.seen) == (0, None)


def test_a_callable_without_a_hash_is_no_activation():
    @dataclass
    class Schedule:
        p: float

        def __call__(self, x):
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(D, F_), nn.Linear(F_, D)
            self.schedule = Schedule(0.1)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    assert len(find_ffns(nn.Sequential(Block()))) == 1


class OwnBlock(nn.Module):
    """A block as users write it: norm, attention, FFN and residuals in one forward."""

    def __init__(self, attention: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, F_), nn.Linear(F_, D)
        self.attn = nn.MultiheadAttention(D, 4, batch_first=True) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.attn(x, x, x)[0]
        return x + self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        (True, "fc1 and fc2 have the shapes of an FFN, .*: then put the FFN in a module of its own"),
        (False, "it adds its input to what its FFN makes of it: put the FFN in a module of its own"),
    ],
)
def test_a_block_that_is_more_than_its_ffn_is_told_what_to_do(attention, told):
    with pytest.raises(NotImplementedError, match=told) as caught:
        find_ffns(nn.Sequential(OwnBlock(attention)).eval())
    assert "attn" not in str(caught.value)
