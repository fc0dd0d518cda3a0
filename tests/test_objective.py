"""What a model is held to while it is trained."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conversions import fingerprint
from sadmoe.ffn import find_ffns
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.training.objective import Remembered, block_of, distill_hidden, distill_logits, outputs
from states import same, state
from tiny_models import TINY, Residual, UserFFN
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from two_ffns import FF, D, KeepsTable, data, mean_square, run_sparsify, short, two_ffns


@pytest.mark.parametrize("objective", ["task", "distill_hidden", "distill_logits"])
def test_a_table_that_a_model_keeps_in_evaluation_mode_holds_no_graph(objective):
    model = nn.Sequential(KeepsTable(), *two_ffns(nn.GELU)).train()
    loss = mean_square if objective == "task" else None
    assert len(run_sparsify(model, short(objective=objective), loss=loss).history) == 6


class Draws(nn.Module):
    """Leaves out some of the tokens, by random numbers, in evaluation too: as a ViTMAE does."""

    def forward(self, x):
        return x[:, torch.randperm(x.shape[1])[: x.shape[1] // 2]]


@pytest.mark.parametrize("objective", ["distill_hidden", "distill_logits"])
def test_a_teacher_that_draws_random_numbers_is_refused(objective):
    model = nn.Sequential(Draws(), *two_ffns(nn.GELU))
    before = state(model)
    with pytest.raises(ValueError, match=r"teacher gives other outputs when it runs on the same batch again"):
        run_sparsify(model, short(objective=objective), [torch.randn(4, 8, D) for _ in range(2)])
    assert same(state(model), before)
    run_sparsify(
        model, short(objective="task"), [torch.randn(4, 8, D)], loss=lambda m, x: m(x).square().mean()
    )


def test_the_blocks_that_are_compared_hold_the_residual():
    model = TINY["bert"].model()
    assert [block_of(model, site) for site in find_ffns(model)] == ["encoder.layer.0", "encoder.layer.1"]
    flat = nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D))
    assert block_of(flat, find_ffns(flat)[0]) == "2"
    whole = nn.Sequential()
    whole.add_module("blocks", checkpoint_wrapper(two_ffns()))
    assert [block_of(whole, site) for site in find_ffns(whole)] == ["blocks.0", "blocks.1"]


def test_hidden_distillation_is_a_relative_error_without_padding():
    tiny = TINY["bert"]
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias += 0.1
    got = distill_hidden(model, dense, find_ffns(model))(batch)
    real = batch["attention_mask"].bool()
    pairs = zip(
        *(m(**batch, output_hidden_states=True).hidden_states[1:] for m in (model, dense)), strict=True
    )
    want = [((h - t)[real].square().sum() / t[real].square().sum()) for h, t in pairs]
    torch.testing.assert_close(got, torch.stack(want).mean())


def test_a_token_that_is_much_longer_than_the_others_does_not_silence_them():
    model, dense, x = two_ffns(), two_ffns(), data()[0]
    objective = distill_hidden(model, dense, find_ffns(model))
    with torch.no_grad():
        model[0].inner.contract.bias += 0.1
        before = objective(x)
        x[:, 0] *= 1000
        after = objective(x)
        # Four tokens of 28 count as a hundred each, where their squares are a million times the others'.
        assert after == pytest.approx(24 / (24 + 400) * 28 / 24 * before, rel=0.5)


def test_states_of_zeros_and_of_padding_alone_are_finite():
    tiny = TINY["bert"]
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    objective = distill_hidden(model, dense, find_ffns(model))
    batch["attention_mask"][:] = 0
    assert objective(batch) == 0
    plain = nn.Sequential(two_ffns()[0])
    for name, p in plain.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    wrong, x = copy.deepcopy(plain), torch.zeros(2, 3, D)
    objective = distill_hidden(wrong, plain, find_ffns(plain))
    assert objective(x) == 0
    wrong[0].inner.contract.bias.data += 1.0
    for others in (0.0, 1e-9):
        x[:] = others
        x[0, 0] = 100 * torch.arange(D)
        assert 1 < objective(x) < 1e7, "relative to the one token that is none of nearly 0"


class InDicts(nn.Module):
    """A block that takes and returns a dict, in which the hidden state is not the first entry."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, state: dict) -> dict:
        return {"step": torch.tensor([1, 2]), "x": self.inner(state["x"])}


@dataclass(slots=True)
class Output:
    step: Tensor
    x: Tensor


class WritesLogits(nn.Module):
    """Writes its answer into the batch, as sentence-transformers do, and returns that."""

    def __init__(self, wrap):
        super().__init__()
        self.blocks, self.wrap = nn.ModuleList(InDicts(block) for block in two_ffns(nn.GELU)), wrap

    def forward(self, features: dict) -> dict:
        state = {"x": features["x"]}
        for block in self.blocks:
            state = block(state)
        features["logits"] = self.wrap(state["x"])
        return features


@pytest.mark.parametrize("objective", ["distill_hidden", "distill_logits"])
def test_a_model_of_dicts_is_held_to_the_dense_one_and_not_to_itself(objective):
    model = WritesLogits(lambda x: x)
    batches = [({"x": x},) for x in data()]
    report = run_sparsify(model, short(objective=objective, steps=8, lr=1e-2), batches)
    assert all(step.objective > 0 for step in report.history[1:])
    assert all(set(batch[0]) == {"x"} for batch in batches)


def test_a_block_without_a_hidden_state_is_named():
    class Counts(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, state: list) -> dict:
            state[0] = self.inner(state[0])
            return {"step": torch.tensor(1.0)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(map(Counts, two_ffns(nn.GELU)))

        def forward(self, x: Tensor) -> Tensor:
            state = [x]
            for block in self.blocks:
                block(state)
            return state[0]

    with pytest.raises(
        TypeError, match=r"blocks.0 returns dict, in which no hidden state \[..., d\] is seen"
    ):
        run_sparsify(Model(), short())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, torch.ones(2, 3)),
        lambda x: ((x, torch.ones(2, 3)), 7),
        lambda x: {"ids": torch.ones(2, 3, dtype=torch.int64), "scale": torch.ones(3), "x": [x]},
        lambda x: Output(torch.ones(2), x),
    ],
)
def test_hidden_states_are_found_in_what_a_block_returns(make):
    class Returns(nn.Module):
        def forward(self, x: Tensor):
            return make(x)

    model, x = nn.Sequential(Returns()), torch.ones(2, 3, 4)
    with outputs(model, ["0"]) as seen:
        model(x)
    assert seen["0"][0] is x


def test_blocks_whose_states_have_no_gradient_are_an_error():
    class Reentrant(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    first, last = two_ffns(nn.ReLU)
    model = nn.Sequential(nn.Linear(D, D), Reentrant(nn.Sequential(first, nn.LayerNorm(D))), last)
    objective = distill_hidden(model, copy.deepcopy(model), find_ffns(model))
    with pytest.raises(RuntimeError, match=r"no gradient to compare what leaves .* by: .*use_reentrant"):
        objective(data()[0])
    with torch.no_grad():
        assert objective(data()[0]) == 0


@pytest.mark.parametrize("objective", ["distill_hidden", "distill_logits"])
def test_a_torch_encoder_is_compared_with_its_padding(objective):
    model, x = TINY["torch encoder"].model(), TINY["torch encoder"].batch()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[1, 4:] = True  # what is left of it torch would make nested, in evaluation alone
    config = short(steps=2, relu_swap=False, objective=objective)
    report = run_sparsify(model, config, [{"src": x, "src_key_padding_mask": padding}])
    assert report.history[0].objective == pytest.approx(0, abs=1e-6)  # the weights are the same
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kept_bytes", "runs"), [(2**20, 1), (0, 3)])
def test_the_dense_model_runs_once_a_batch_where_its_states_are_kept(kept_bytes, runs):
    tiny = TINY["bert"]
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias += 0.1
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    objective = distill_hidden(model, dense, find_ffns(model), kept_bytes=kept_bytes)
    errors = [objective(batch, 7) for _ in range(3)]
    assert errors[0] == errors[1] == errors[2] > 0
    assert len(calls) == runs + 1, "and once to see whether it gives the same again"
    objective(batch, None)
    objective(batch, 8)
    assert len(calls) == runs + 3, "another batch, or one that is not known, is not the one kept"


@pytest.mark.parametrize(("kept_bytes", "runs"), [(2**20, 1), (0, 3)])
def test_nor_more_often_for_its_logits(kept_bytes, runs):
    tiny, calls = TINY["llama"], []
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    dense.register_forward_hook(lambda *_: calls.append(1))
    objective = distill_logits(model, dense, kept_bytes=kept_bytes)
    errors = [objective(batch, 7) for _ in range(3)]
    assert errors[0] == errors[1] == errors[2] > 0
    assert len(calls) == runs + 1, "and once to see whether it gives the same again"


def test_what_is_kept_counts_the_tensors_inside_objects():
    class Cache:
        def __init__(self):
            self.layers, self.itself = [(torch.ones(100), torch.ones(100))], self

    kept = Remembered(1000)
    kept.get(1, Cache)
    kept.get(2, Cache)
    assert list(kept.results) == [1]
    assert kept.free == 200


def test_logits_of_padding_alone_are_no_loss():
    tiny = TINY["llama"]
    dense, batch = tiny.model(), tiny.batch()
    objective = distill_logits(copy.deepcopy(dense), dense)
    nothing = batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}
    assert objective(nothing) == 0


def test_the_model_itself_cannot_teach_its_logits():
    model = TINY["bert classifier"].model()
    config = SparsifyConfig(steps=1, objective="distill_logits")
    with pytest.raises(ValueError, match="teacher is the model that is trained itself: pass a copy"):
        sparsify_(model, [TINY["bert classifier"].batch()], config, teacher=model, progress=False)


def test_a_teacher_of_another_kind_is_refused():
    tiny = TINY["llama"]
    model, shorter = tiny.model(), tiny.model()
    del shorter.model.layers[-1]
    for teacher, told in (
        (model, "teacher is the model that is trained itself: pass a copy"),
        (shorter, r"teacher must be a model of the same blocks, but has no model\.layers\.\d+"),
        (two_ffns(), "teacher must be a model of the same blocks, but has no model.layers.0"),
    ):
        with pytest.raises(ValueError, match=told):
            sparsify_(model, [tiny.batch()], short(), teacher=teacher, progress=False)
    longer = tiny.model()
    longer.model.layers.append(copy.deepcopy(longer.model.layers[-1]))
    with pytest.raises(ValueError, match=r"same blocks, but has \d+ in model.layers, the model \d+"):
        sparsify_(model, [tiny.batch()], short(), teacher=longer, progress=False)


def test_a_teacher_is_left_as_it_was_and_may_not_be_compiled():
    tiny = TINY["llama"]
    model, teacher = tiny.model(), tiny.model().train()
    before = fingerprint(teacher)
    sparsify_(model, [tiny.batch()], short(), teacher=teacher, progress=False)
    assert fingerprint(teacher) == before
    with pytest.raises(ValueError, match="teacher: is compiled"):
        sparsify_(model, [tiny.batch()], short(), teacher=torch.compile(teacher), progress=False)


class Towers(nn.Module):
    """Two FFNs, the second for batches that hold images alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.vision = (nn.ModuleList([Residual(UserFFN(nn.ReLU()))]) for _ in range(2))

    def forward(self, x, image=None):
        y = self.text[0](x)
        return y if image is None else y + self.vision[0](image)


def test_a_batch_may_leave_out_a_tower():
    model, x = Towers().eval(), torch.randn(2, 5, D)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        model.text[0].inner.contract.weight.mul_(0.5)
    sites = find_ffns(model)
    objective = distill_hidden(model, dense, sites)
    of_text = distill_hidden(model, dense, sites[:1])
    assert objective({"x": x}) == of_text({"x": x}) > 0
    assert objective({"x": x, "image": x}) == of_text({"x": x}) / 2, (
        "the mean over both, of which one is as it was"
    )
    with pytest.raises(ValueError, match=r"a batch reaches none of vision\.0: leave it out"):
        distill_hidden(model, dense, sites[1:])({"x": x})
