"""Which rows are real tokens, and what a model answers at these."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from sadmoe.modules import is_encoder_decoder
from sadmoe.padding import answer, padding_mask, real_rows
from tiny_models import Returns
from torch import nn


def test_the_padding_mask_is_a_two_dimensional_attention_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert padding_mask({"attention_mask": mask}).tolist() == mask.bool().tolist()
    assert padding_mask({"attention_mask": torch.ones(1, 1, 3, 3)}) is None
    assert padding_mask({"attention_mask": None}) is None
    assert padding_mask({"input_ids": mask}) is None
    assert padding_mask((mask,)) is None


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5)])
def test_real_rows_follow_the_mask_also_when_the_model_flattens(shape):
    rows = real_rows(nn.Identity(), "layers.0", {"attention_mask": MASK}, torch.zeros(shape))
    assert rows.tolist() == [True, True, False, True, False, False]


def test_real_rows_follow_the_mask_where_the_tokens_come_first():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    rows = real_rows(nn.Identity(), "layers.0", {"attention_mask": mask}, torch.zeros(3, 2, 5))
    assert rows.tolist() == [True, True, True, False, True, False]


def test_real_rows_are_unknown_when_the_mask_is_of_another_length():
    with pytest.warns(
        UserWarning, match="of 3 tokens, and layers of this Identity run on 4: all of these count"
    ):
        assert real_rows(nn.Identity(), "layers.0", {"attention_mask": MASK}, torch.zeros(2, 4, 5)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of keys that are made of an image's patches
        of_patches = torch.zeros(2, 4, 5)
        key = "crossattention.self.key"
        assert real_rows(nn.Identity(), key, {"attention_mask": MASK}, of_patches) is None
    assert real_rows(nn.Identity(), "layers.0", (torch.zeros(2),), torch.zeros(2, 3, 5)) is None


def test_a_span_is_answered_by_both_its_ends_at_real_tokens():
    start, end = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    model = Returns(lambda attention_mask: {"loss": None, "start_logits": start, "end_logits": end})
    expected = torch.stack([start[MASK.bool()], end[MASK.bool()]], dim=-1)
    assert torch.equal(answer(model, {"attention_mask": MASK}), expected)


def test_the_answer_is_the_first_tensor_of_whatever_comes_out():
    x = torch.ones(2, 3)
    for make in (
        lambda x: [{"boxes": 2 * x}],
        lambda x: {"out": {"a": 2 * x}},
        lambda x: (None, 7, x.sum(), [2 * x]),
        lambda x: {"loss": x, "logits": 2 * x},
        lambda x: {
            "input_ids": x.long(),
            "attention_mask": x,
            "embedding": 2 * x,
        },  # what it was given, and more
    ):
        assert torch.equal(answer(Returns(make), x), 2 * x)
    features = {"attention_mask": x}
    extended = Returns(lambda given: given.update(embedding=2 * x) or given)  # as sentence-transformers do
    assert torch.equal(answer(extended, [features]), 2 * x)
    for make in (
        lambda x: None,
        lambda x: [],
        lambda x: {"out": "text"},
        lambda x: (x.sum(),),
        lambda x: (x,),
    ):
        with pytest.raises(TypeError, match=r"Returns returned .* with no tensor to compare"):
            answer(Returns(make), x)


def encoder_decoder():
    model = nn.Identity()
    model.config, model.decoder = SimpleNamespace(is_encoder_decoder=True), nn.Identity()
    return model


def test_an_encoder_taken_out_of_an_encoder_decoder_answers_to_its_mask():
    around, x = nn.Module(), torch.zeros(2, 3, 5)
    around.encoder = nn.Identity()
    around.encoder.config = SimpleNamespace(is_encoder_decoder=True)  # the whole one's
    batch = {"attention_mask": MASK, "labels": torch.full((2, 3), -100)}
    assert real_rows(around, "encoder.layers.0", batch, x).tolist() == MASK.bool().flatten().tolist()
    assert not is_encoder_decoder(around)
    assert is_encoder_decoder(encoder_decoder())


def test_a_decoder_answers_to_its_own_mask_only_beside_an_encoder():
    model, x = nn.Identity(), torch.zeros(2, 3, 5)
    batch = {"attention_mask": MASK, "decoder_attention_mask": 1 - MASK}
    alone = {"attention_mask": MASK, "labels": torch.full((2, 3), -100)}
    assert real_rows(model, "model.decoder.layers.0", alone, x).tolist() == MASK.bool().flatten().tolist()
    of_decoder = (1 - MASK).bool().flatten().tolist()
    assert (
        real_rows(model, "text_decoder.layers.0", batch, x).tolist() == of_decoder
    )  # BLIP, whose config denies it
    model = encoder_decoder()
    for name in ("decoder.block.0", "text_decoder.layers.0.ffn"):  # SeamlessM4T
        assert real_rows(model, name, batch, x).tolist() == of_decoder
    assert real_rows(model, "encoder.block.0", batch, x).tolist() == MASK.bool().flatten().tolist()
    assert real_rows(model, "decoder.block.0", {"attention_mask": MASK}, x) is None
    around = nn.Module()  # such as a module of lightning
    around.model = model
    rows = real_rows(around, "model.decoder.block.0", batch, x)
    assert rows.tolist() == (1 - MASK).bool().flatten().tolist()


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.encoder_attn.k_proj",
        "decoder.block.0.layer.1.EncDecAttention.v",
        "decoder.encoder.layer.0.crossattention.self.key",
        "decoder.layer.0.encoder_decoder_attention.attention.value",
        "decoder.transformer.h.0.crossattention.c_attn",
    ],
)
def test_keys_and_values_of_the_encoder_answer_to_its_mask(name):
    model, x = encoder_decoder(), torch.zeros(2, 3, 5)
    batch = {"attention_mask": MASK, "decoder_attention_mask": 1 - MASK}
    assert real_rows(model, name, batch, x).tolist() == MASK.bool().flatten().tolist()
    others = ("decoder.layers.0.self_attn.k_proj", "encoder_decoder.decoder.layers.0.self_attn.k_proj")
    for own in (name.rpartition(".")[0] + ".q_proj", *others):
        assert real_rows(model, own, batch, x).tolist() == (1 - MASK).bool().flatten().tolist()


def test_a_decoder_without_a_mask_answers_to_the_padding_of_its_labels():
    model, x = encoder_decoder(), torch.zeros(2, 3, 5)
    batch = {"attention_mask": MASK, "labels": torch.tensor([[5, 6, -100], [7, -100, -100]])}
    real = [True, True, False, True, False, False]
    assert real_rows(model, "decoder.layers.0.fc1", batch, x).tolist() == real
    assert real_rows(model, "encoder.layers.0.fc1", batch, x).tolist() == MASK.bool().flatten().tolist()
    model.config.is_encoder_decoder = False  # a prompt without labels is real
    assert real_rows(model, "decoder.layers.0.fc1", batch, x).tolist() == MASK.bool().flatten().tolist()


def test_a_decoder_that_is_given_no_tokens_reads_the_encoder_s_one_place_on():
    model, x = encoder_decoder(), torch.zeros(2, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": mask, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    assert real_rows(model, "decoder.layers.0.fc1", batch, x).tolist() == [True] * 5 + [False]
    assert real_rows(model, "encoder.layers.0.fc1", batch, x).tolist() == mask.bool().flatten().tolist()
    several = batch | {"labels": torch.ones(2, 4)}  # classes of each text
    assert real_rows(model, "decoder.layers.0.fc1", several, x).tolist() == [True] * 5 + [False]
    assert real_rows(model, "decoder.layers.0.fc1", batch | {"decoder_input_ids": mask}, x) is None


def test_the_mask_of_a_text_is_not_that_of_the_image_beside_it():
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    x = torch.zeros(2, 5, 3)
    assert real_rows(nn.Linear(3, 3), "text_model.mlp", batch, x).sum() == 7
    assert real_rows(nn.Linear(3, 3), "vision_model.mlp", batch, x).sum() == 7
    batch["pixel_values"] = torch.zeros(2, 3, 4, 4)
    assert real_rows(nn.Linear(3, 3), "text_model.mlp", batch, x).sum() == 7
    assert real_rows(nn.Linear(3, 3), "vision_model.mlp", batch, x) is None
    assert real_rows(nn.Linear(3, 3), "vision_language_model.language_model.mlp", batch, x).sum() == 7


def test_a_mask_is_not_of_what_has_as_many_rows_by_chance():
    positions = torch.zeros(1, MASK.numel(), 5)  # relative ones
    assert real_rows(nn.Identity(), "attention.pos_key_proj", {"attention_mask": MASK}, positions) is None


def test_a_model_that_fills_up_to_a_window_has_no_more_real_tokens_than_the_batch():
    model = nn.Identity()
    model.config = SimpleNamespace(attention_window=[8, 8])
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    assert real_rows(model, "layer", batch, torch.zeros(2, 8, 5)).view(2, 8).sum(1).tolist() == [3, 1]
    assert real_rows(model, "layer", batch, torch.zeros(8, 2, 5)).view(8, 2).sum(0).tolist() == [3, 1]
    model.config = SimpleNamespace()
    with pytest.warns(UserWarning, match="of 3 tokens, and layers of this Identity run on 8"):
        assert real_rows(model, "layer", batch, torch.zeros(2, 8, 5)) is None


def test_several_texts_a_sample_have_one_mask_of_all():
    """As BertForMultipleChoice takes them."""
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]]).expand(4, 2, 3)
    batch = {"input_ids": torch.zeros(4, 2, 3, dtype=torch.int64), "attention_mask": mask}
    assert torch.equal(padding_mask(batch), mask.flatten(0, 1).bool())
    real = real_rows(nn.Identity(), "encoder.0", batch, torch.zeros(8, 3, 5))
    assert torch.equal(real, mask.flatten().bool())
    assert padding_mask({"attention_mask": mask}) is None, "of what, nothing says"


def test_masks_of_parts_of_a_batch_are_told_not_to_be_used():
    part = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    padded = {**part, "attention_mask": torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])}
    with pytest.warns(UserWarning, match="an attention_mask in each of positive, and no part"):
        assert (
            real_rows(nn.Identity(), "", {"anchor": part, "positive": padded}, torch.zeros(2, 3, 5)) is None
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert real_rows(nn.Identity(), "", {"anchor": part}, torch.zeros(2, 3, 5)) is None
