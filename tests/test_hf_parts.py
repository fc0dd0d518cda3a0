"""Parts of transformers models, and models that have converted ones as parts, or wrappers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")
import sadmoe
import sadmoe.hf
from converted import converted
from hf_models import described, same
from sadmoe import SavedModelError, load, moe_layers, restore_, save, set_tau
from sadmoe.hf.names import found_in
from tiny_models import TINY, call

pytestmark = pytest.mark.usefixtures("loud")


def test_a_body_loads_under_a_head_and_a_head_s_body_without_it(tmp_path, caplog):
    body, whole = described("bert"), described("bert classifier")
    body.save_pretrained(tmp_path / "body")
    whole.save_pretrained(tmp_path / "whole")
    under_a_head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body")
    without = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert "classifier.weight" in caplog.text  # transformers' own report, about the head alone
    assert "intermediate" not in caplog.text
    assert same(under_a_head.bert, body, "bert")
    assert same(without, whole.bert, "bert")
    assert list(under_a_head.config.quantization_config.layers) == list(moe_layers(under_a_head))
    assert list(without.config.quantization_config.layers) == list(moe_layers(without))


def test_a_module_that_initialises_the_linear_layer_that_was_there_is_left_alone(tmp_path):
    """The mixer of GroupViT stays, one of its linear layers is a MoE layer, and transformers asks it to initialise."""
    import transformers

    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 24,
        "intermediate_size": 60,
        "depths": [1, 1, 1],
    }
    config = transformers.GroupViTVisionConfig(num_hidden_layers=3, num_attention_heads=4, **sizes)
    model = transformers.GroupViTVisionModel(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    settings = sadmoe.ConvertConfig(expert_size=4, tau=0.1, router=sadmoe.RouterConfig(width=4, steps=2))
    sadmoe.convert_(model, [batch], settings, progress=False)
    assert any(name.endswith("mlp_inter.fc1") for name in moe_layers(model))
    model.save_pretrained(tmp_path)
    loaded = transformers.GroupViTVisionModel.from_pretrained(tmp_path)
    assert torch.equal(call(loaded, batch), call(model, batch))


def image_and_text(name):
    """A small model of that name that sees images and reads, which has no name of its own for what sees."""
    text = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 24,
        "intermediate_size": 60,
        "num_attention_heads": 4,
    }
    if name == "GroupViT":
        vision |= {"depths": [1, 1, 1], "num_hidden_layers": 3}
    else:
        vision |= {"num_hidden_layers": 1}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", ["GroupViT", "OwlViT"])
def test_what_sees_is_loaded_from_a_model_that_also_reads(name, tmp_path):
    model = image_and_text(name)
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(3, 49, (2, 6))
    settings = sadmoe.ConvertConfig(expert_size=4, tau=0.1, router=sadmoe.RouterConfig(width=4, steps=2))
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sadmoe.convert_(model, [batch], settings, progress=False)
    model.save_pretrained(tmp_path)
    part = getattr(transformers, f"{name}VisionModel").from_pretrained(tmp_path)
    assert len(moe_layers(part)) == len(moe_layers(model.vision_model)) > 0
    wanted = model.vision_model(pixel_values=pixels).last_hidden_state
    assert torch.equal(part(pixel_values=pixels).last_hidden_state, wanted)
    restore_(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_a_part_that_calls_its_layers_otherwise_is_refused_not_left_dense(tmp_path):
    """Attention's, as in a version of transformers that calls them otherwise, where the FFNs are found."""
    model = TINY["bert"].model()
    sadmoe.replace_projections_(
        model, [TINY["bert"].batch()], sadmoe.ProjectionConfig(steps=1), progress=False
    )
    config = sadmoe.ConvertConfig(expert_size=4, tau=0.1, router=sadmoe.RouterConfig(steps=1, width=4))
    sadmoe.convert_(model, [TINY["bert"].batch()], config, progress=False)
    model.save_pretrained(tmp_path)
    said = tmp_path / "config.json"
    said.write_text(said.read_text().replace("attention.self.query", "attention.attention.query"))
    with pytest.raises(
        SavedModelError, match=r"its encoder.layer.\d.attention has no attention.query, which is"
    ):
        type(model).from_pretrained(tmp_path)


def test_a_model_of_fewer_blocks_loads_those_that_it_has(tmp_path):
    model = described("bert")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, num_hidden_layers=1)
    assert list(moe_layers(again)) == list(moe_layers(model))[:1]
    assert again._no_split_modules >= {"DynamicKMoE"}
    restore_(again)
    assert "DynamicKMoE" not in again._no_split_modules


def test_what_a_module_makes_when_it_is_initialised_is_made_around_an_ffn(tmp_path):
    """A layer of SAM 3 holds an FFN whole, and a table of its own that is in no file."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    places = {
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "pretrain_image_size": 16,
        "global_attn_indexes": [1],
    }
    torch.manual_seed(0)
    model = transformers.Sam3ViTModel(transformers.Sam3ViTConfig(**sizes, **places)).eval()
    batch = {"pixel_values": torch.randn(1, 3, 32, 32)}
    settings = sadmoe.ConvertConfig(expert_size=4, tau=0.1, router=sadmoe.RouterConfig(width=4, steps=2))
    sadmoe.convert_(model, [batch], settings, progress=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.Sam3ViTModel.from_pretrained(tmp_path)
    assert torch.equal(call(loaded, batch), call(model, batch))


def test_an_encoder_loads_alone(tmp_path):
    model = described("t5")
    model.save_pretrained(tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    ids = {"input_ids": TINY["t5"].batch()["input_ids"]}
    assert torch.equal(encoder(**ids)[0], model.encoder(**ids)[0])
    assert list(encoder.config.quantization_config.layers) == [TINY["t5"].names[0]]


def test_a_model_under_wrappers_that_checkpoint_activations_is_saved_as_without(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    tiny = TINY["bert"]
    dense, batch = tiny.model(), tiny.batch()
    model = copy.deepcopy(dense)
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "BertLayer")
    router = sadmoe.RouterConfig(steps=2, width=4)
    sadmoe.convert_(model, [batch], sadmoe.ConvertConfig(experts=4, tau=0.2, router=router), progress=False)
    assert list(moe_layers(model)) == ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"]
    model.save_pretrained(tmp_path)
    save(model, tmp_path / "moe.safetensors")
    again, ours = type(dense).from_pretrained(tmp_path), copy.deepcopy(dense)
    load(ours, tmp_path / "moe.safetensors")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        assert torch.equal(again(**batch).last_hidden_state, wanted)
        assert torch.equal(ours(**batch).last_hidden_state, wanted)
        restore_(model)
        assert torch.equal(model(**batch).last_hidden_state, dense(**batch).last_hidden_state)


@pytest.mark.parametrize("wrapped", ["all", "the first"])
def test_a_budget_is_solved_for_all_layers_under_wrappers_that_checkpoint_activations(wrapped):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    tiny = TINY["bert"]
    plain, batch = tiny.model(), tiny.batch()
    model = copy.deepcopy(plain)
    blocks = list(model.encoder.layer)[: None if wrapped == "all" else 1]
    apply_activation_checkpointing(model, check_fn=lambda m: any(m is block for block in blocks))
    seen = []
    config = sadmoe.ConvertConfig(
        experts=4,
        budget=0.7,
        router=sadmoe.RouterConfig(steps=2, width=2),
        filter=lambda name: not seen.append(name),
    )
    reports = [sadmoe.convert_(one, [batch], config, progress=False) for one in (plain, model)]
    assert not any("wrapped" in name for name in seen)
    assert [row.name for row in reports[1].layers] == [row.name for row in reports[0].layers]
    assert reports[1].tau == reports[0].tau > 0
    assert {layer.gate.tau for layer in moe_layers(model).values()} == {reports[0].tau}


def test_projections_are_known_under_wrappers_that_checkpoint_activations():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    tiny = TINY["bert"]
    model, batch = tiny.model(), tiny.batch()
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "BertLayer")
    dense = copy.deepcopy(model)
    settings = sadmoe.ProjectionConfig(steps=1, multiple=4)
    report = sadmoe.replace_projections_(model, [batch], settings, progress=False)
    assert report.layers[0].name == "encoder.layer.0.attention.self.query"
    routers = [sadmoe.RouterConfig(steps=2, width=width) for width in (4, 2)]
    config = sadmoe.ConvertConfig(expert_size=4, router=routers[0], projection_router=routers[1])
    sadmoe.convert_(model, [batch], config, progress=False)
    sadmoe.fit_routers_(model, [batch], routers[0])
    restore_(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, dense(**batch).last_hidden_state)


def test_a_part_saves_itself(tmp_path):
    model = described("bert classifier")
    model.bert.save_pretrained(tmp_path)
    assert same(transformers.AutoModel.from_pretrained(tmp_path), model.bert, "bert")


def test_a_model_whose_part_was_converted_saves_it(tmp_path):
    torch.manual_seed(0)
    config = TINY["bert"].model().config
    model = transformers.BertForSequenceClassification(config).eval()
    batch = TINY["bert"].batch()
    sadmoe.convert_(
        model.bert, [batch], sadmoe.ConvertConfig(expert_size=10, router=sadmoe.RouterConfig(steps=1))
    )
    set_tau(model, 0.3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert moe_layers(again).keys() == moe_layers(model).keys() != set()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_dense_model_of_a_converted_ones_config_saves_itself(tmp_path):
    described("bert").save_pretrained(tmp_path / "moe")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "moe")
    dense = transformers.AutoModel.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModel.from_pretrained(tmp_path / "dense").eval()
    batch = TINY["bert"].batch()
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], dense(**batch)[0])


def test_a_transformers_model_inside_another_module_is_described():
    outer = nn.Sequential(converted("bert"))
    sadmoe.hf.describe_to_transformers(outer)
    assert list(outer[0].config.quantization_config.layers) == list(TINY["bert"].names)


def test_tensors_of_the_caller_s_that_are_mapped_and_changed_stay_as_they_are(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_act="relu",
    )
    model = transformers.BertModel(config).eval()
    router = sadmoe.RouterConfig(width=8, steps=2)
    batches = [{"input_ids": torch.arange(9)[None]}]
    sadmoe.convert_(model, batches, sadmoe.ConvertConfig(tau=0.1, router=router), progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    loaded = transformers.BertModel.from_pretrained(None, config=model.config, state_dict=tensors)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
    (layer,) = moe_layers(loaded).values()
    assert torch.equal(layer.w_up, kept["encoder.layer.0.intermediate.w_up"])


def test_a_config_of_a_converted_model_may_be_given(tmp_path):
    model = converted("bert")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, config=model.config)
    assert list(moe_layers(again)) == list(moe_layers(model))


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ("encoder.0.mlp", "bert.encoder.0.mlp"),
        ("bert.encoder.0.mlp", "encoder.0.mlp"),
        ("model.language_model.layers.0.mlp", "model.layers.0.mlp"),
        ("language_model.layers.0.mlp", "layers.0.mlp"),
    ],
)
def test_layers_are_found_by_the_names_that_they_have_in_a_part(saved, here):
    model = nn.Module()
    model.base_model_prefix = "bert"
    model.named_modules = lambda: [(here, nn.Module())]
    assert found_in(model, {saved: "what it is"}) == {here: "what it is"}
    with pytest.raises(SavedModelError, match="does not fit this Module"):
        found_in(model, {f"other.{saved}": "what it is"})


def test_a_module_further_out_may_initialise_what_was_replaced(tmp_path):
    """V-JEPA 2's pooler scales a weight of the FFN two modules below it, whatever is loaded there later."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2.25}
    pixels = {"crop_size": 16, "patch_size": 8, "frames_per_clip": 2, "tubelet_size": 2}
    pred = {"pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(**sizes, **pixels, **pred, num_pooler_layers=1)
    model = transformers.VJEPA2ForVideoClassification(config).eval()
    batch = {"pixel_values_videos": torch.randn(2, 2, 3, 16, 16)}
    quick = sadmoe.ConvertConfig(
        expert_size=8,
        tau=0.3,
        router=sadmoe.RouterConfig(width=8, steps=2),
        filter=lambda name: "predictor" not in name,
    )
    sadmoe.convert_(model, [batch], quick, progress=False)
    model.save_pretrained(tmp_path)
    again = transformers.VJEPA2ForVideoClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not any("fc2" in layer.__dict__ for layer in moe_layers(again).values())
