"""All that comes after a conversion, in one call."""

import copy
from dataclasses import replace

import pytest
import sadmoe
import torch
from clock import Clock
from sadmoe import budget, moe_layers
from sadmoe.calibrate import BudgetError
from sadmoe.cost import cost
from sadmoe.gates import DynamicK, TopK
from text_losses import text_batches
from tiny_models import TINY, call
from torch import nn

pytest.importorskip("transformers")
BUDGET = 0.6


@pytest.fixture(autouse=True)
def seconds_of_updates(monkeypatch):
    """A second of training is 50 readings of the clock: as many updates on any machine."""
    monkeypatch.setattr("sadmoe.training.loop.time", Clock(0.02))


@pytest.fixture(scope="module")
def dense():
    return TINY["bert"].model().eval()


@pytest.fixture
def model(dense):
    model = copy.deepcopy(dense)
    config = sadmoe.ConvertConfig(
        experts=12, router=sadmoe.RouterConfig(steps=2, width=4), cluster="activity"
    )
    sadmoe.convert_(model, text_batches(), config, progress=False)
    return model


def finetuned(model, dense, batches=None, **settings):
    short = sadmoe.RouterConfig(steps=20, width=4, target_power=0.5)
    settings = {"budget": BUDGET, "seconds": 3.0, "router": short, **settings}
    batches = text_batches() if batches is None else batches
    return sadmoe.finetune_for_budget_(model, batches, dense=dense, progress=False, **settings)


def error(model, dense):
    with torch.no_grad():
        wrong = [(call(model, batch) - call(dense, batch)).square().mean() for batch in text_batches()]
    return torch.stack(wrong).mean().item()


def test_the_budget_is_met_and_the_model_is_nearer_to_the_dense_one_than_by_calibration_alone(model, dense):
    plain = copy.deepcopy(model)
    sadmoe.fit_routers_(plain, text_batches(), replace(budget.ROUTERS, width=4))
    sadmoe.calibrate_(plain, text_batches(), budget=BUDGET)
    report = finetuned(model, dense, router=budget.ROUTERS)
    found = cost(model, text_batches())
    assert report.calibration.cost.layers_of_dense == found.executed / found.dense <= BUDGET
    assert list(report.routers) == [fit.name for fit in report.layers] == list(moe_layers(model))
    assert error(model, dense) < 0.8 * error(plain, dense)
    told = str(report)
    assert told.count("router R²") == 2
    assert "the whole model: " in told
    assert f"tau {report.calibration.tau:.4f} executes" in told


@pytest.fixture
def given(monkeypatch):
    """By step, the settings and the arguments by name that it was last called with."""
    seen = {}
    for name in ("finetune_layers_", "fit_routers_", "finetune_"):
        step = getattr(budget, name)

        def noted(model, batches, config, *args, name=name, step=step, **settings):
            seen[name] = config, settings
            return step(model, batches, config, *args, **settings)

        monkeypatch.setattr(budget, name, noted)
    return seen


def test_every_argument_reaches_the_step_that_it_is_for(model, dense, given):
    def loss(output, wanted, batch):
        return (output.last_hidden_state - wanted.last_hidden_state).square().mean()

    router = sadmoe.RouterConfig(width=99, steps=7)
    finetuned(model, dense, seconds=0.5, router=router, max_tokens=50, seed=3, output_loss=loss)
    layers, routers, whole = (given[name] for name in ("finetune_layers_", "fit_routers_", "finetune_"))
    assert (layers[0].seconds, layers[0].share, layers[0].seed) == (pytest.approx(0.15), BUDGET / 2, 3)
    assert (whole[0].seconds, whole[0].seed) == (pytest.approx(0.35), 3)
    assert (routers[0].steps, routers[0].seed) == (7, 3)
    assert layers[1]["max_tokens"] == routers[1]["max_tokens"] == 50
    assert whole[1]["output_loss"] is loss


def test_an_error_in_the_last_step_leaves_weights_routers_and_gates(model, dense, monkeypatch):
    for layer in moe_layers(model).values():
        layer.gate = TopK(3)
    before = copy.deepcopy(model.state_dict())

    def fails(*args, **kw):
        raise KeyError

    monkeypatch.setattr(budget, "finetune_", fails)
    with pytest.raises(KeyError):
        finetuned(model, dense, seconds=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.gate for layer in moe_layers(model).values()] == [TopK(3)] * 2


def test_what_is_done_is_not_done_again(model, dense, tmp_path, monkeypatch):
    again, folder = copy.deepcopy(model), sadmoe.Checkpoint(tmp_path)
    first = finetuned(model, dense, seconds=0.5, checkpoint=folder)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was trained again"))
    second = finetuned(again, dense, seconds=0.5, checkpoint=folder)
    assert first.calibration.tau == second.calibration.tau
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_another_budget_leaves_what_is_kept_of_the_first(model, dense, tmp_path):
    other, folder = copy.deepcopy(model), sadmoe.Checkpoint(tmp_path)
    finetuned(model, dense, seconds=0.5, checkpoint=folder)
    report = finetuned(other, dense, seconds=0.5, budget=0.8, checkpoint=folder)
    assert 0.6 < report.calibration.cost.layers_of_dense <= 0.8
    steps = ("layers", "routers", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {f"{s} {b}" for s in steps for b in (0.6, 0.8)}


def test_a_loader_that_draws_others_goes_on_with_the_tau_of_before(model, dense, tmp_path, monkeypatch):
    again, folder = copy.deepcopy(model), sadmoe.Checkpoint(tmp_path)
    generator = torch.Generator()
    drawn = torch.utils.data.DataLoader(text_batches(), batch_size=None, shuffle=True, generator=generator)
    first = finetuned(model, dense, drawn, seconds=0.5, checkpoint=folder)
    monkeypatch.setattr(
        budget, "calibrate_", lambda model, *_, **__: sadmoe.set_tau(model, 0.9) or first.calibration
    )
    finetuned(again, dense, drawn, seconds=0.5, checkpoint=folder)  # or the last step would be of another run
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_oracles_and_loaders_do(model, dense):
    for layer in moe_layers(model).values():
        layer.gate = DynamicK(0.1, true_norms=True)
    loader = torch.utils.data.DataLoader(text_batches(), batch_size=None)
    report = sadmoe.finetune_for_budget_(
        model, loader, budget=BUDGET, seconds=0.3, dense=dense, progress=False
    )
    assert [layer.gate for layer in moe_layers(model).values()] == [DynamicK(report.calibration.tau)] * 2


def test_with_projections_it_is_taught_by_what_was_converted(dense, given):
    model = copy.deepcopy(dense)
    sadmoe.replace_projections_(model, text_batches(), sadmoe.ProjectionConfig(steps=2), progress=False)
    sparse = copy.deepcopy(model)
    config = sadmoe.ConvertConfig(
        expert_size=4,
        router=sadmoe.RouterConfig(steps=2, width=4),
        projection_router=sadmoe.RouterConfig(steps=2, width=2),
    )
    sadmoe.convert_(model, text_batches(), config, progress=False)
    report = finetuned(model, dense, sparse=sparse, seconds=0.5, budget=0.9)
    assert len(report.layers) == len(moe_layers(model)) == 10
    widths = {len(layer.router.v1) for layer in moe_layers(model).values()}
    assert widths == {2, 4}
    assert given["finetune_layers_"][1]["teacher"] is sparse
    assert given["finetune_"][1]["teacher"] is dense


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"budget": 0.01}, "budget 0.01 is below what one expert"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\]"),
        ({"seconds": 0.0}, "seconds must be above 0, got 0.0"),
        ({"output_loss": "logit"}, "output_loss must be one of logits, got 'logit'"),
        ({"output_loss": "logits"}, "the logits of a model are .* this one gives BaseModelOutput"),
        ({"output_loss": 2.0}, r"output_loss must be output_loss\(model's output, .* or None, got 2.0"),
        ({"output_loss": lambda output, wanted: 0.0}, "takes 2 positional arguments but 3 were given"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(model, dense, monkeypatch, kw, text):
    monkeypatch.setattr(budget, "finetune_layers_", lambda *args, **settings: pytest.fail("it trains"))
    with pytest.raises((ValueError, TypeError), match=text):
        finetuned(model, dense, **kw)


def test_a_dense_model_that_shares_what_is_trained_is_refused_before_that(model, dense, monkeypatch):
    monkeypatch.setattr(budget, "finetune_layers_", lambda *args, **settings: pytest.fail("it trains"))
    model.embeddings.word_embeddings.weight = dense.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match=r"teacher has embeddings.word_embeddings.weight of the model"):
        finetuned(model, dense, sparse=copy.deepcopy(dense))


class Pyramid(nn.Module):
    """A narrow FFN that sees all tokens, and a wide one that sees one of eight."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.wide = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x):
        x = x + self.narrow(x)
        return self.wide(x.unflatten(1, (-1, 8)).flatten(2))


def test_a_budget_out_of_reach_is_refused_by_how_often_each_layer_runs(monkeypatch):
    monkeypatch.setattr(budget, "finetune_layers_", lambda *args, **settings: pytest.fail("it trains"))
    dense, batches = Pyramid().eval(), [torch.randn(2, 16, 16)]
    model = copy.deepcopy(dense)
    router = sadmoe.RouterConfig(steps=1, width=8)
    sadmoe.convert_(model, batches, sadmoe.ConvertConfig(expert_size=16, router=router), progress=False)
    alike, real = cost(model, shares=1.0), cost(model, batches)
    between = (alike.floor / alike.dense + real.floor / real.dense) / 2
    assert alike.floor / alike.dense < between < real.floor / real.dense
    with pytest.raises(BudgetError, match="is below what one expert per token costs"):
        finetuned(model, dense, batches, budget=between)


class Towers(nn.Module):
    """An FFN for each of two kinds of input, of which a batch has one or both."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleDict({kind: ffn() for kind in ("text", "image")})

    def forward(self, batch):
        return {kind: self.towers[kind](x) for kind, x in batch.items()}


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


@pytest.mark.parametrize("as_loader", [False, True])
def test_what_few_batches_run_is_calibrated_on_one_of_them(as_loader):
    torch.manual_seed(0)
    dense, x = Towers().eval(), torch.randn(30, 2, 5, 16)
    batches = [{"batch": {"image" if i == 17 else "text": some}} for i, some in enumerate(x)]
    if as_loader:
        batches = torch.utils.data.DataLoader(batches, batch_size=None)
    model = copy.deepcopy(dense)
    config = sadmoe.ConvertConfig(expert_size=8, router=sadmoe.RouterConfig(steps=1, width=4))
    sadmoe.convert_(model, batches, config, progress=False)
    report = finetuned(model, dense, batches, budget=0.8, seconds=0.5)
    assert {layer.name: layer.tokens > 0 for layer in report.calibration.cost.layers} == {
        "towers.text": True,
        "towers.image": True,
    }


def test_compiled_models_are_refused_before_anything_is_trained(model, dense, monkeypatch):
    monkeypatch.setattr(budget, "finetune_layers_", lambda *args, **settings: pytest.fail("it trains"))
    with pytest.raises(ValueError, match="model: is compiled"):
        finetuned(torch.compile(copy.deepcopy(model)), dense)
    with pytest.raises(ValueError, match="dense: is compiled"):
        finetuned(copy.deepcopy(model), torch.compile(dense))


def test_what_routers_predict_comes_back_after_an_error(model, dense, monkeypatch):
    monkeypatch.setattr(budget, "finetune_", lambda *args, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetuned(model, dense)
    assert {layer.router.target_power for layer in moe_layers(model).values()} == {1.0}


def test_a_sparse_model_that_was_forgotten_is_missed(dense):
    sparse = copy.deepcopy(dense)
    sadmoe.sparsify_(sparse, text_batches(), sadmoe.SparsifyConfig(steps=1), progress=False)
    model = copy.deepcopy(sparse)
    router = sadmoe.RouterConfig(steps=2, width=4)
    sadmoe.convert_(model, text_batches(), sadmoe.ConvertConfig(experts=12, router=router), progress=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"intermediate had relu: here it has gelu; give sparse=, what sparsify_ made"
    ):
        finetuned(model, dense)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    finetuned(model, dense, sparse=sparse)


def test_a_dense_model_is_refused(dense):
    with pytest.raises(ValueError, match="no converted layer"):
        finetuned(copy.deepcopy(dense), dense)


def test_the_converted_model_is_not_the_dense_one(model):
    with pytest.raises(
        ValueError, match="dense must be the model from before convert_: got one with converted"
    ):
        finetuned(model, model)
