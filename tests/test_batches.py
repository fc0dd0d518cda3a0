from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from sadmoe.batches import check_batches, length, run, samples_in, to_device
from sadmoe.modules import device_of, evaluating
from tiny_models import Returns
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Add(nn.Module):
    def forward(self, a, b=10):
        return a + b


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


ONE = torch.ones(2)


def test_a_module_that_does_more_than_set_a_flag_is_told_the_mode_that_it_comes_back_to():
    class Merged(nn.Linear):
        """As loralib's: in evaluation an adapter is added to the weight."""

        def train(self, mode: bool = True) -> nn.Module:
            if mode != self.training:
                self.weight.data += -1.0 if mode else 1.0
            return super().train(mode)

    model = nn.Sequential(Merged(3, 3), nn.Dropout().eval())
    before = model[0].weight.clone()
    with evaluating(model):
        assert not torch.allclose(model[0].weight, before)
    torch.testing.assert_close(model[0].weight, before)
    assert [m.training for m in model] == [True, False]


def test_modes_come_back_where_a_module_refuses_one():
    class AlwaysTraining(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            if not mode:
                raise RuntimeError("it cannot be evaluated")
            return super().train(mode)

    model = nn.Sequential(nn.Dropout(), AlwaysTraining())
    with pytest.raises(RuntimeError, match="it cannot be evaluated"), evaluating(model):
        pass
    assert all(m.training for m in model)


@pytest.mark.parametrize(
    ("batch", "sum_"),
    [({"a": ONE, "b": ONE}, 2), (UserDict(a=ONE, b=ONE), 2), ((ONE, ONE), 2), ([ONE, 3], 4), (ONE, 11)],
)
def test_a_batch_says_how_the_model_is_called(batch, sum_):
    assert run(Add(), batch).tolist() == [sum_, sum_]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((torch.ones(2), torch.zeros(2)), "a tuple of 2: .* takes 2 positional arguments but 3 were given"),
        (
            {"input": torch.ones(2), "labels": torch.ones(2)},
            "a mapping of input, labels: .* argument 'labels'",
        ),
        ({}, "a mapping of nothing: .* missing 1 required positional argument: 'input'"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_named(batch, said):
    with pytest.raises(TypeError, match=f"a ReLU cannot be called with the batch, {said}"):
        run(nn.ReLU(), batch)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.ones((2, 3)), r"'x' holds a numpy.ndarray: give torch.as_tensor of it"),
        ([np.ones(3)], r"'x' holds a numpy.ndarray"),
        (
            [[1, 2], [3]],
            r"'x' is a list of numbers, perhaps where a tensor is meant: tokenizers .* by return_tensors=\"pt\"",
        ),
    ],
)
def test_numbers_in_no_tensor_are_named_where_the_model_does_not_take_them(x, told):
    class Sized(nn.Module):
        def forward(self, x):
            return x.relu()

    with pytest.raises(TypeError, match=rf"a Sized cannot run the batch \(.*\): {told}"):
        run(Sized(), {"x": x})
    with pytest.raises(TypeError, match=told.replace("'x'", "0")):
        run(Sized(), (x,))
    assert run(nn.Identity(), (x,)) is not None


def test_another_error_beside_a_list_of_numbers_stays_as_it_is():
    class Broken(nn.Module):
        def forward(self, x, sizes):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(Broken(), {"x": torch.ones(2), "sizes": [4, 6]})


def test_a_mistake_inside_the_model_stays_as_it_is():
    class Broken(nn.Module):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match=r"^object of type 'int' has no len"):
        run(Broken(), torch.ones(2))


def test_copies_of_a_model_that_run_in_threads_are_refused():
    model = nn.DataParallel(nn.Linear(2, 2), device_ids=[])
    x = torch.ones(1, 2)
    assert torch.equal(run(model, x), model.module(x))
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match="give the model inside"):
        run(model, x)


def test_something_else_is_no_batch():
    with pytest.raises(TypeError, match="a batch must be a Mapping, a tuple, a list or a Tensor, got int"):
        run(Add(), 3)


def test_every_tensor_moves_and_the_rest_stays():
    pair = namedtuple("pair", "x label")
    batch = {"a": ONE, "b": [ONE, (ONE, "name")], "c": pair(ONE, 3), "d": None}
    moved = to_device(batch, "meta")
    assert all(t.is_meta for t in (moved["a"], moved["b"][0], moved["b"][1][0], moved["c"].x))
    assert (moved["b"][1][1], moved["c"].label, moved["d"]) == ("name", 3, None)
    assert not ONE.is_meta
    assert isinstance(moved["c"], pair)


def test_mappings_of_a_kind_of_their_own_stay_of_that_kind():
    class Named(UserDict):
        def __getattr__(self, name):
            try:
                return self.data[name]
            except KeyError:
                raise AttributeError(name) from None

    batch = Named(ids=ONE, inner=OrderedDict(x=ONE), fixed=MappingProxyType({"x": ONE}))
    moved = to_device(batch, "meta")
    assert moved.ids.is_meta
    assert type(moved["inner"]) is OrderedDict
    assert type(moved["fixed"]) is dict, "what is no dict may share what its copy holds"
    assert moved["inner"]["x"].is_meta
    assert moved["fixed"]["x"].is_meta
    assert not batch.ids.is_meta


def test_outputs_of_transformers_stay_so():
    outputs = pytest.importorskip("transformers").modeling_outputs
    moved = to_device({"encoder_outputs": outputs.BaseModelOutput(last_hidden_state=ONE)}, "meta")
    assert isinstance(moved["encoder_outputs"], outputs.BaseModelOutput)
    assert moved["encoder_outputs"][0] is moved["encoder_outputs"].last_hidden_state
    assert moved["encoder_outputs"][0].is_meta


def test_the_device_is_that_of_the_weights():
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


@pytest.mark.parametrize("batches", [[ONE], (ONE,), DataLoader([ONE]), DataLoader(Endless())])
def test_a_collection_that_can_be_repeated_is_accepted(batches):
    check_batches(batches)


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        (iter([ONE]), TypeError, "one-shot iterator list_iterator: pass list"),
        ((x for x in [ONE]), TypeError, "one-shot iterator generator"),
        ({"input_ids": ONE}, TypeError, "got one dict: wrap it in a list"),
        (ONE, TypeError, "got one Tensor: wrap it in a list"),
        (7, TypeError, "must be a list or a DataLoader of batches, got int"),
        ([], ValueError, "at least one batch, got an empty collection"),
    ],
)
def test_what_cannot_be_repeated_is_refused(batches, error, text):
    with pytest.raises(error, match=text):
        check_batches(batches)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ({"use_cache": False, "n": torch.tensor(3), "x": torch.zeros(4, 2)}, 4),
        ((None, ONE), 2),
        (ONE, 2),
        ((1,), 1),
    ],
)
def test_the_samples_of_a_batch_are_counted_on_its_first_tensor(batch, samples):
    assert samples_in(batch) == samples


def test_a_collection_need_not_know_its_length():
    assert length([ONE, ONE]) == 2
    assert length(DataLoader(Endless())) is None


def test_a_model_that_writes_into_what_it_is_given_leaves_the_batch_alone():
    batch = ({"x": torch.ones(2), "more": [{"y": torch.ones(2)}]},)

    def writes(given):
        given["more"][0]["y"] = given["answer"] = 2 * given["x"]
        return given

    output = run(Returns(writes), batch)
    assert torch.equal(output["answer"], torch.full((2,), 2.0))
    assert set(batch[0]) == {"x", "more"}
    assert torch.equal(batch[0]["more"][0]["y"], torch.ones(2))
    assert batch[0]["x"] is output["x"]


def test_samples_are_counted_in_a_mapping_inside_another():
    assert samples_in(({"inputs": {"ids": torch.ones(8, 3), "mask": torch.ones(8, 3)}, "n": 5},)) == 8
    assert (
        samples_in(
            {"images": [torch.ones(3, 4, 4)] * 2, "more": {"x": torch.ones(5)}, "ids": torch.ones(2, 7)}
        )
        == 2
    )
    assert samples_in(([torch.ones(3, 4, 4)] * 2, torch.ones(2))) == 2


def test_samples_in_a_tuple_of_one_mapping_are_those_of_the_mapping():
    ids = torch.zeros(16, 8)
    assert [samples_in(batch) for batch in ({"ids": ids}, ({"ids": ids},), (ids,), ids)] == [16] * 4
    assert samples_in((1,)) == samples_in(({},)) == samples_in(()) == 1


def test_evaluating_gives_every_training_flag_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
