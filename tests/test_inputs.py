import pytest
import torch
from sadmoe.ffn import find_ffns
from sadmoe.inputs import held_out_and_batches, stream_inputs
from sadmoe.padding import real_rows
from sites import collected, first_modules
from tiny_models import SIZES, TINY, WAVES, call
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Rows(nn.Module):
    """Two sites that see the rows and twice the rows, and one that never runs."""

    def __init__(self, d=3):
        super().__init__()
        self.a, self.b, self.never = nn.Linear(d, 4), nn.Linear(d, 4), nn.Linear(d, 4)
        self.calls, self.drop = 0, nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        self.calls += 1
        return self.a(x) + self.b(input=2 * self.drop(x))

    def sites(self, *names):
        return {name: getattr(self, name) for name in names}


def numbered(*sizes, d=3):
    """Batches of rows that are told apart by their first entry."""
    rows = torch.arange(float(sum(sizes)))[:, None] * torch.tensor([1.0, 0.5, -1.0])[:d]
    return list(rows.split(sizes))


def ids(rows):
    return rows[:, 0].long().tolist()


def test_all_tokens_come_in_order_when_they_fit():
    model = Rows()
    inputs = collected(model, model.sites("a", "b"), numbered(4, 1, 3), max_tokens=8)
    assert ids(inputs["a"]) == list(range(8))
    assert torch.equal(inputs["b"], 2 * inputs["a"])


def test_a_sample_has_the_wanted_size_no_token_twice_and_the_same_tokens_for_every_site():
    model = Rows()
    inputs = collected(model, model.sites("a", "b"), numbered(40, 1, 30, 7), max_tokens=25)
    assert len(set(ids(inputs["a"]))) == 25
    assert torch.equal(inputs["b"], 2 * inputs["a"])


def test_the_sample_follows_the_seed_alone():
    model = Rows()
    draws = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        draws.append(ids(collected(model, model.sites("a"), numbered(60, 60), max_tokens=10, seed=seed)["a"]))
        assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_every_token_is_as_likely_as_any_other():
    model, counts, draws = Rows(), torch.zeros(40), 300
    batches = numbered(3, 10, 20, 7)
    for seed in range(draws):
        sample = collected(model, model.sites("a"), batches, max_tokens=10, seed=seed)["a"]
        counts[ids(sample)] += 1
    expected = draws * 10 / 40
    deviation = (expected * (1 - 10 / 40)) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * deviation
    for part in counts.split([3, 10, 20, 7]):  # no batch is favoured for its place
        assert abs(part.mean() - expected) < 4.5 * deviation / len(part) ** 0.5


def test_padding_is_left_out_unless_wanted():
    model = Rows()
    x = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 3)
    batches = [{"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}]
    assert ids(collected(model, model.sites("a"), batches, max_tokens=9)["a"]) == [0, 1, 3]
    everything = collected(model, model.sites("a"), batches, max_tokens=9, skip_padding=False)
    assert ids(everything["a"]) == list(range(6))


@pytest.mark.parametrize(("max_bytes", "passes"), [(2 * 10 * 3 * 4, 1), (10 * 3 * 4, 2), (1, 2)])
def test_sites_that_do_not_fit_together_take_another_pass(max_bytes, passes):
    model = Rows()
    stream = stream_inputs(model, model.sites("b", "a"), numbered(30, 30), max_tokens=10, max_bytes=max_bytes)
    inputs = dict(stream)
    assert model.calls == 2 * passes
    assert set(inputs) == {"a", "b"}
    assert torch.equal(inputs["b"], 2 * inputs["a"])


def test_a_loader_that_shuffles_gives_every_pass_the_same():
    model = Rows()
    data = DataLoader(torch.cat(numbered(60)), batch_size=7, shuffle=True)
    inputs = [
        dict(stream_inputs(model, model.sites("a", "b"), data, max_tokens=10, max_bytes=most))
        for most in (2**20, 1)
    ]
    for name in ("a", "b"):
        assert torch.equal(inputs[0][name], inputs[1][name])
    assert torch.equal(inputs[1]["b"], 2 * inputs[1]["a"])


def test_batches_that_are_used_up_after_a_pass_are_told_as_such():
    class Once(IterableDataset):
        left = iter(numbered(4, 4))

        def __iter__(self):
            return self.left

    model, data = Rows(), DataLoader(Once(), batch_size=None)
    with pytest.raises(
        ValueError, match="batches gave nothing when they were gone through again: pass a list"
    ):
        dict(stream_inputs(model, model.sites("a", "b"), data, max_tokens=9, max_bytes=1))


def test_the_model_is_left_as_it_was():
    model = Rows().train()
    collected(model, model.sites("a"), numbered(4), max_tokens=4)
    assert model.training
    assert model.drop.training
    assert not model.a._forward_pre_hooks
    with pytest.raises(RuntimeError, match="shapes"):
        collected(model, model.sites("a"), [torch.zeros(2, 5)], max_tokens=4)
    assert model.training
    assert not model.a._forward_pre_hooks


def test_a_site_that_never_runs_is_named():
    model = Rows()
    with pytest.raises(ValueError, match="the batches never reach never: pass batches that run every FFN"):
        collected(model, model.sites("a", "never"), numbered(4), max_tokens=4)


def test_at_least_two_tokens_must_be_wanted():
    with pytest.raises(ValueError, match="max_tokens must be at least 2, to hold some out, got 1"):
        collected(Rows(), Rows().sites("a"), numbered(4), max_tokens=1)
    with pytest.raises(TypeError, match="one-shot iterator"):
        collected(Rows(), Rows().sites("a"), iter(numbered(4)), max_tokens=2)


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "opt", "t5", "timm vit", "torchvision vit", "torch encoder"]
)
def test_what_is_collected_is_what_enters_the_ffn(name):
    model, batch = TINY[name].model(), TINY[name].batch()
    batch = batch if isinstance(batch, dict) else (batch,)
    sites = find_ffns(model)
    seen = {}
    hooks = [
        site.first.register_forward_pre_hook(lambda m, args, name=site.name: seen.update({name: args[0]}))
        for site in sites
    ]
    with torch.no_grad():
        call(model, batch)
    for hook in hooks:
        hook.remove()
    inputs = collected(model, first_modules(model), [batch], max_tokens=100)
    assert list(inputs) == [site.name for site in sites]
    for site in sites:
        expected = seen[site.name].reshape(-1, site.dense().d)
        if "attention_mask" in batch and not (name == "t5" and "decoder" in site.name):
            expected = expected[batch["attention_mask"].bool().flatten()]
        torch.testing.assert_close(inputs[site.name], expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_torch_encoder_gives_its_tokens():
    model, x = TINY["torch encoder"].model(), TINY["torch encoder"].batch()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[1, 4:] = True
    batches = [{"src": x, "src_key_padding_mask": padding}]
    inputs = collected(model, first_modules(model), batches, max_tokens=100)
    assert {len(rows) for rows in inputs.values()} == {
        int((~padding).sum())
    }  # torch drops the padding itself


@pytest.mark.parametrize(
    ("rows", "size", "lengths"), [(1140, 1024, [1026]), (1140, 500, [513, 513]), (20, 7, [6, 6, 6])]
)
def test_batches_are_of_one_length_so_that_every_token_counts_alike(rows, size, lengths):
    x = torch.arange(rows)
    test, batches = held_out_and_batches("a layer", {"x": x, "y": -x}, size)
    assert len(test["x"]) == rows // 10
    assert [len(batch["x"]) for batch in batches] == lengths
    assert torch.equal(torch.cat([test["x"], *(batch["x"] for batch in batches)]), x)
    assert all(torch.equal(batch["x"], -batch["y"]) for batch in (test, *batches))


def _parakeet():
    """An encoder of spectra, 8 frames of 64."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 9}
    model = transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**SIZES, **sizes)).eval()
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 40:] = 0
    return model, {"input_features": torch.randn(2, 64, 16), "attention_mask": mask}


@pytest.mark.parametrize(
    ("make", "frames"),
    [(lambda: (TINY["wav2vec2"].model(), TINY["wav2vec2"].batch()), 19 + 9), (_parakeet, 8 + 5)],
    ids=["wav2vec2", "parakeet"],
)
def test_of_sounds_the_frames_of_padding_are_left_out(make, frames, recwarn):
    model, batch = make()
    modules = first_modules(model)
    for name, rows in stream_inputs(model, modules, [batch], max_tokens=100):
        assert len(rows) == frames, name
    for name, rows in stream_inputs(model, modules, [batch], max_tokens=100, skip_padding=False):
        assert len(rows) > frames, name
    assert not [w for w in recwarn if "real tokens" in str(w.message)]


def test_after_an_adapter_frames_of_padding_are_left_out_too(recwarn):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        **WAVES, add_adapter=True, num_adapter_layers=2, output_hidden_size=24
    )
    model, batch = transformers.Wav2Vec2Model(config).eval(), TINY["wav2vec2"].batch()
    x = model(**batch).last_hidden_state
    assert x.shape[1] < 19
    long, short = real_rows(model, "", batch, x).view(2, -1).sum(1).tolist()
    assert long == x.shape[1] > short > 0
    assert not [w for w in recwarn if "real tokens" in str(w.message)]


def test_a_mask_is_used_for_frames_of_its_own_rate_alone():
    model, batch = _parakeet()
    whole = torch.ones(2, 64, dtype=torch.int64)
    assert real_rows(model, "layers.0", {"attention_mask": whole}, torch.zeros(2, 16, 24)) is None, (
        "half as often"
    )
    text = {"input_ids": whole[:, :6], "attention_mask": whole[:, :6]}
    assert real_rows(model, "layers.0", batch | text, torch.zeros(2, 8, 24)) is None, (
        "of a text beside the sound"
    )
    assert real_rows(model, "layers.0", batch, torch.zeros(2, 8, 24)).sum() == 8 + 5


def test_a_mask_that_cannot_be_used_is_told_where_it_leaves_tokens_out(recwarn):
    transformers = pytest.importorskip("transformers")
    sizes = WAVES | {"conv_stride": (5, *6 * (2,)), "conv_kernel": (10, *4 * (3,), 2, 2), "squeeze_factor": 2}
    model, batch = transformers.SEWModel(transformers.SEWConfig(**sizes)).eval(), TINY["wav2vec2"].batch()
    modules = first_modules(model)
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert all(len(rows) == 2 * 9 for _, rows in stream_inputs(model, modules, [whole], max_tokens=100))
    assert not [w for w in recwarn if "real tokens" in str(w.message)]
    told = "attention_mask is of 6400 tokens, and layers of this SEWModel run on 9: all of these count as real tokens"
    with pytest.warns(UserWarning, match=told):
        assert all(len(rows) == 2 * 9 for _, rows in stream_inputs(model, modules, [batch], max_tokens=100))
