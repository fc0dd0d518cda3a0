"""Linear layers of an FFN: read where they are plain, and named where they are not."""

import pytest
import torch
import torch.nn.utils.prune
from sadmoe.ffn import (
    FFNNotFoundError,
    find_ffns,
    layer_from_dense,
    swap_in,
    swap_out,
)
from sites import assert_same_state, reason, slots_of, state
from tiny_models import F_, TINY, D, Residual, Scaled, UserFFN
from torch import Tensor, nn
from two_ffns import two_ffns


def test_linear_layers_that_run_several_times_are_refused():
    ffn = [nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D)]
    model = nn.Sequential(nn.Sequential(*ffn * 3), nn.Linear(D, 2))
    with pytest.raises(NotImplementedError, match="0 has several places in its module"):
        find_ffns(model)


def test_a_pruned_bias_is_named():
    ffn = UserFFN()
    torch.nn.utils.prune.random_unstructured(ffn.expand, "bias", 0.3)
    assert "has a bias of type Tensor, not an nn.Parameter" in reason(ffn)


def test_tied_weights_and_modules_used_elsewhere_are_refused():
    model = nn.Sequential(UserFFN(nn.ReLU()), UserFFN(nn.ReLU()))
    model[1].expand.weight = model[0].expand.weight
    with pytest.raises(
        NotImplementedError, match=r"0 \(UserFFN\): expand\.weight is tied with 1\.expand\.weight"
    ):
        find_ffns(model)
    model = nn.Sequential(UserFFN(nn.ReLU()), Residual(nn.Identity()))
    model[1].probe = model[0].expand
    with pytest.raises(NotImplementedError, match=r"expand is a child of 1 too"):
        find_ffns(model)
    model = nn.Sequential(UserFFN(nn.ReLU()), UserFFN(nn.ReLU()))
    for ffn in model:
        ffn.expand = nn.Sequential(ffn.expand)
    assert len(find_ffns(model)) == 2
    model[1].expand = model[0].expand  # what holds a linear layer
    with pytest.raises(FFNNotFoundError):
        find_ffns(model)


class _Falcons(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_a_linear_layer_of_its_own_class_that_computes_the_same_is_one():
    ffn = UserFFN(nn.ReLU())
    ffn.expand = _Falcons(D, F_)
    model, x = nn.Sequential(ffn), torch.randn(3, D)
    wanted = model.eval()(x)
    (site,) = find_ffns(model)
    swap_in(model, site, layer_from_dense(site.dense(), slots_of(site), 4).eval())
    torch.testing.assert_close(model(x), wanted)
    swap_out(model, "0")
    assert type(model[0].expand) is _Falcons
    assert torch.equal(model(x), wanted)


def test_linear_layers_that_accelerate_let_go_of_are_plain_again():
    accelerate = pytest.importorskip("accelerate")
    model = TINY["bert"].model()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(NotImplementedError, match="something wraps"):
        find_ffns(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert len(find_ffns(model)) == 2


def test_what_more_a_linear_layer_holds_is_named_where_it_may_matter():
    ffn = UserFFN(nn.ReLU())
    ffn.expand.register_buffer("note", torch.zeros(1))  # nn.Linear's own forward reads no more than it did
    assert [site.name for site in find_ffns(nn.Sequential(ffn))] == ["0"]
    nn.utils.prune.l1_unstructured(ffn.expand, "weight", 0.5)
    assert "expand has a weight of type Tensor and dtype torch.float32, not a float nn.Parameter" in reason(
        ffn
    )
    ffn = UserFFN(nn.ReLU())
    ffn.expand = Scaled(D, F_)
    assert "expand is a Scaled that holds scale too; only nn.Linear" in reason(ffn)
    ffn.expand = nn.Linear(D, F_)
    del ffn.expand.weight  # packed elsewhere
    assert "expand has a weight of type NoneType, not a float nn.Parameter" in reason(ffn)


def test_weights_that_are_computed_are_not_asked_for():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(24, 24)), *two_ffns()).train()
    before = state(model)
    find_ffns(model)
    assert_same_state(state(model), before)
