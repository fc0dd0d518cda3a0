"""FFNs of every kind of model: found, read, replaced by an equal MoE layer, and put back bit for bit."""

import ast
import copy
import json
from pathlib import Path

import pytest
import sadmoe.ffn
import torch
import torch.nn.functional as F
from sadmoe.ffn import (
    ADAPTERS,
    FFNNotFoundError,
    find_ffns,
    layer_from_dense,
    moe_layers,
    scan_ffns,
    site_from_spec,
    site_of,
    spec,
    swap_activations_,
    swap_in,
)
from sadmoe.layer import DynamicKMoE
from sites import assert_close, assert_same_state, convert, restore, state
from tiny_models import F_, TINY, D, Residual, Tiny, UserFFN, UserGLU, call, hidden, tokens
from torch import Tensor, nn

every_model = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


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
    with pytest.raises(
        FFNNotFoundError, match=r"the filter \(--only\) refused all there are:\n  0.inner\n  1.inner"
    ):
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
