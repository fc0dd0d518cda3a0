"""Wrong types in configs: named before anything is computed."""

import dataclasses
import inspect
import re

import numpy
import pytest
import sadmoe
import torch
from converted import converted
from sadmoe import Checkpoint, ConvertConfig, FinetuneConfig, ProjectionConfig, RouterConfig, SparsifyConfig
from tiny_models import TINY


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ConvertConfig(expert_size="32"),
            "ConvertConfig: expert_size must be an int or None, got '32'",
        ),
        (lambda: ConvertConfig(max_tokens=1e4), "ConvertConfig: max_tokens must be an int, got 10000.0"),
        (lambda: ConvertConfig(seed=torch.ones(3)), r"ConvertConfig: seed must be an int, got tensor\(\["),
        (lambda: Checkpoint(3), "Checkpoint: folder must be a str or a PathLike, got 3"),
        (lambda: ConvertConfig(budget="half"), "ConvertConfig: budget must be a number or None, got 'half'"),
        (lambda: ConvertConfig(router=64), "ConvertConfig: router must be a RouterConfig, got 64"),
        (lambda: ConvertConfig(filter="encoder"), "filter must be a function or None, got 'encoder'"),
        (lambda: ConvertConfig(skip_padding=None), "skip_padding must be a bool, got None"),
        (lambda: RouterConfig(lr=None), "RouterConfig: lr must be a number, got None"),
        (lambda: SparsifyConfig(steps=[10]), r"SparsifyConfig: steps must be an int or None, got \[10\]"),
        (lambda: FinetuneConfig(seconds="9"), "FinetuneConfig: seconds must be a number or None, got '9'"),
        (lambda: ProjectionConfig(ratio="1"), "ProjectionConfig: ratio must be a number, got '1'"),
        (lambda: ProjectionConfig(act=None), "ProjectionConfig: act must be a str, got None"),
    ],
)
def test_a_field_of_another_type_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


BATCHES = [TINY["user glu"].batch()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sadmoe.calibrate_(m, BATCHES, budget="0.5"), "budget must be a number, got '0.5'"),
        (
            lambda m: sadmoe.calibrate_(m, BATCHES, max_loss_increase="1"),
            "max_loss_increase must be a number, got '1'",
        ),
        (
            lambda m: sadmoe.finetune_for_budget_(m, BATCHES, budget=0.5, seconds="9", dense=m),
            "seconds must be a number, got '9'",
        ),
        (
            lambda m: sadmoe.set_batch_invariant(m, None, expected_share="half"),
            r"expected_share must be a number in \[0, 1\], got 'half'",
        ),
        (lambda m: sadmoe.set_tau("bert", 0.1), "model must be a torch.nn.Module, got str"),
        (lambda m: sadmoe.restore_(None), "model must be a torch.nn.Module, got NoneType"),
        (lambda m: sadmoe.cost(3, BATCHES), "model must be a torch.nn.Module, got int"),
        (lambda m: sadmoe.quantize_experts_({}), "model must be a torch.nn.Module, got dict"),
        (
            lambda m: sadmoe.finetune_(m, BATCHES, FinetuneConfig(steps=1), teacher="bert"),
            "teacher must be a torch.nn.Module, got str",
        ),
        (lambda m: sadmoe.replace_projections_("bert", BATCHES), "model must be a torch.nn.Module, got str"),
        (lambda m: sadmoe.find_ffns(m, batches=iter(BATCHES)), "one-shot iterator"),
        (lambda m: sadmoe.find_projections(m, batches=BATCHES[0]), "batches must be a list or a DataLoader"),
    ],
)
def test_an_argument_of_another_type_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call(converted("user glu"))


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    router = RouterConfig(width=numpy.int32(4), steps=1, lr=torch.tensor(0.5))
    config = ConvertConfig(
        expert_size=numpy.int64(5), budget=numpy.float32(0.75), seed=torch.tensor(3), router=router
    )
    assert [type(value) for value in (config.expert_size, config.budget, config.seed, router.lr)] == [
        *(int, float, int, float)
    ]
    tiny = TINY["user glu"]
    report = sadmoe.convert_(
        tiny.model(), [tiny.batch()], config, checkpoint=Checkpoint(tmp_path), progress=False
    )
    assert '"budget": 0.75' in report.to_json()


def test_a_folder_may_be_a_string_or_a_path(tmp_path):
    assert Checkpoint(str(tmp_path)).file("a") == Checkpoint(tmp_path).file("a")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (sadmoe.convert_, "ConvertConfig"),
        (sadmoe.sparsify_, "SparsifyConfig"),
        (sadmoe.finetune_, "FinetuneConfig"),
        (sadmoe.replace_projections_, "ProjectionConfig"),
        (sadmoe.fit_routers_, "RouterConfig"),
    ],
)
def test_a_config_of_another_kind_is_named(call, kind):
    model, batches = TINY["user glu"].model(), [TINY["user glu"].batch()]
    if call is sadmoe.fit_routers_:
        own = ConvertConfig(expert_size=5, router=RouterConfig(width=4, steps=1))
        sadmoe.convert_(model, batches, own, progress=False)
    with pytest.raises(TypeError, match=rf"config must be a {kind}, got dict: give {kind}\(\*\*config\)"):
        call(model, batches, {"seed": 3})
    with pytest.raises(TypeError, match=rf"config must be a {kind}, got int: give {kind}\(...\)"):
        call(model, batches, 3)


@pytest.mark.parametrize(
    "config",
    [value for name, value in vars(sadmoe).items() if name.endswith("Config")],
    ids=lambda config: config.__name__,
)
def test_help_explains_every_field_of_a_config(config):
    told = inspect.getdoc(config)
    named = {name for line in re.findall(r"^([\w, ]+): ", told, re.MULTILINE) for name in line.split(", ")}
    assert {field.name for field in dataclasses.fields(config)} <= named
