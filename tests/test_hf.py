import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

import sadmoe
import sadmoe.hf
from converted import converted
from sadmoe import SavedModelError, load, moe_layers, restore_, save, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.hf.quantizer import SadmoeConfig, SadmoeQuantizer, _check_loaded, _found_in
from tiny_models import TINY, call

NAMES = [
    "bert",
    "bert classifier",
    "roberta",
    "gpt2",
    "t5",
    "t5 v1.1",
    "llama",
    "qwen3",
    "gemma",
    "phi3",
    "vit",
    "dinov2",
    "albert",
    "opt",
]


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """transformers' warnings reach caplog, its progress bars nobody."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity(verbosity)


def described(name: str) -> Any:
    """A converted transformers model at tau = 0.3, its config up to date as convert_ leaves it."""
    model = converted(name)
    sadmoe.hf.describe_to_transformers(model)
    set_tau(model, 0.3)
    transformers.logging.set_verbosity_warning()
    return model


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def edit_config(path: Path, edit: Any) -> None:
    config = config_of(path)
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, edit: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors, next(key for key in tensors if key.endswith("w_up")))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def same(a: nn.Module, b: nn.Module, name: str) -> bool:
    batch = TINY[name].batch()
    return torch.equal(call(a, batch), call(b, batch))


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_gives_the_same_bits_without_a_warning(name, shard, tmp_path, caplog):
    model = described(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "50GB"
    loaded = type(model).from_pretrained(tmp_path)
    assert same(loaded, model, name)
    assert list(moe_layers(loaded)) == list(moe_layers(model))
    assert {layer.gate for layer in moe_layers(loaded).values()} == {DynamicK(0.3)}
    a, b = model.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(p.data_ptr() % 64 == 0 for layer in moe_layers(loaded).values() for p in layer.parameters())
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "vit"])
def test_the_same_bits_in_bfloat16(name, tmp_path):
    model = described(name)
    model.save_pretrained(tmp_path)
    # loaded twice, because .to(bfloat16) would also cast constants that transformers keeps in float32
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {layer.w_up.dtype for layer in moe_layers(loaded).values()} == {torch.bfloat16}
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    assert torch.equal(call(loaded, batch), call(model, batch))


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModel"),
        ("llama", "AutoModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
    ],
)
def test_auto_classes_load_it(name, auto, tmp_path):
    model = described(name)
    model.save_pretrained(tmp_path)
    assert same(getattr(transformers, auto).from_pretrained(tmp_path), model, name)


def test_generate_gives_the_same_tokens(tmp_path):
    model = described("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = {"input_ids": torch.tensor([[5, 9, 3]]), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))


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


def test_the_tau_of_the_moment_is_saved(tmp_path):
    model = described("bert")
    moe_layers(model)["encoder.layer.1.intermediate"].gate = TopK(2)
    set_it = moe_layers(model)["encoder.layer.0.intermediate"]
    set_it.gate = DynamicK(0.7)
    model.save_pretrained(tmp_path)
    gates = [entry["gate"] for entry in config_of(tmp_path)["quantization_config"]["layers"].values()]
    assert gates == [
        {"rule": "dynamic_k", "tau": 0.7, "true_norms": False},
        {"rule": "top_k", "k": 2, "true_norms": False},
    ]
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert [layer.gate for layer in moe_layers(loaded).values()] == [DynamicK(0.7), TopK(2)]


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    model = described("bert")
    averaged = {k: v / 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(averaged))  # which it empties
    again = type(model).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, averaged[name]), name


def test_convert_describes_and_restore_forgets(tmp_path):
    tiny = TINY["t5"]
    model = tiny.model()
    config = sadmoe.ConvertConfig(expert_size=5, router=sadmoe.RouterConfig(width=4, steps=5))
    sadmoe.convert_(model, [tiny.batch()], config, progress=False)
    assert isinstance(model.config.quantization_config, SadmoeConfig)
    model.save_pretrained(tmp_path / "moe")
    assert same(type(model).from_pretrained(tmp_path / "moe"), model, "t5")
    restore_(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert not any(hasattr(module, "hf_quantizer") for module in model.modules())
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert moe_layers(dense) == {}
    assert same(dense, tiny.model(), "t5")


def test_a_loaded_model_restores_and_dequantizes_to_the_dense_one(tmp_path):
    described("llama").save_pretrained(tmp_path)
    dense = TINY["llama"].model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    restore_(loaded)
    assert same(loaded, dense, "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again.dequantize(), dense, "llama")
    assert not hasattr(again.config, "quantization_config")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dequantize(torch.bfloat16)
    assert third.dtype == torch.bfloat16


def test_models_that_share_a_config_keep_their_own_account(tmp_path):
    transformers.logging.set_verbosity_error()
    one = TINY["bert"].model()
    twin = type(one)(one.config)
    config = sadmoe.ConvertConfig(expert_size=5, router=sadmoe.RouterConfig(width=4, steps=5))
    batches = [TINY["bert"].batch()]
    sadmoe.sparsify_(one, batches, sadmoe.SparsifyConfig(steps=1), teacher=twin, progress=False)
    sadmoe.convert_(one, batches, config, progress=False)
    assert one.config.hidden_act == "relu"
    assert one.config is one.encoder.config
    twin.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["hidden_act"] == "gelu"
    assert "quantization_config" not in saved


def test_an_activation_that_no_config_names_is_told(caplog):
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=24, n_layer=1, n_head=4)
    model, ids = transformers.BloomModel(bloom), {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    sadmoe.sparsify_(model, [ids], sadmoe.SparsifyConfig(steps=1, objective="distill_hidden"), progress=False)
    assert "the config of this BloomModel has no name for its activation" in caplog.text


def test_sadmoe_s_own_files_hold_transformers_models_too(tmp_path):
    model = described("bert")
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["bert"].build().eval()
    load(fresh, tmp_path / "m.safetensors")
    fresh.save_pretrained(tmp_path / "hf")
    assert same(transformers.AutoModel.from_pretrained(tmp_path / "hf"), model, "bert")


def test_a_transformers_model_inside_another_module_is_described():
    outer = nn.Sequential(converted("bert"))
    sadmoe.hf.describe_to_transformers(outer)
    assert list(outer[0].config.quantization_config.layers) == list(TINY["bert"].names)


def test_copies_and_pickles_keep_the_gates(tmp_path):
    model = described("bert")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert same(other, model, "bert")
        set_tau(other, 0.9)
        other.save_pretrained(tmp_path)
        assert {
            g.gate.tau for g in moe_layers(transformers.AutoModel.from_pretrained(tmp_path)).values()
        } == {0.9}
    assert {layer.gate.tau for layer in moe_layers(model).values()} == {0.3}


def test_a_loaded_model_casts_and_is_not_called_quantized(tmp_path):
    described("bert").save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    assert loaded.to(torch.bfloat16).dtype == torch.bfloat16
    assert not getattr(loaded, "is_quantized", False)
    assert loaded.hf_quantizer.is_compileable


def test_weights_that_are_brought_when_a_layer_runs(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, batch = described("bert"), TINY["bert"].batch()
    set_tau(model, 0.3)
    wanted = call(model, batch)
    model.save_pretrained(tmp_path / "saved")
    places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    loaded = transformers.AutoModel.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(call(loaded, batch), wanted)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(call(model, batch), wanted)


def test_float16_where_transformers_keeps_float32_is_warned_of(tmp_path, caplog):
    described("t5").save_pretrained(tmp_path)
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert "in float32" not in caplog.text
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert ".wo: T5ForConditionalGeneration keeps it in float32" in caplog.text


def test_a_loaded_model_asks_for_the_gradients_that_a_converted_one_does(tmp_path):
    model = described("bert")
    model.save_pretrained(tmp_path)
    asked = {
        name: p.requires_grad
        for name, p in transformers.AutoModel.from_pretrained(tmp_path).named_parameters()
    }
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name.rpartition(".")[2] for name, wanted in asked.items() if not wanted} == {"v1", "v2"}


def test_trainer_trains_and_saves_a_loaded_model(tmp_path):
    pytest.importorskip("accelerate")
    described("bert classifier").save_pretrained(tmp_path / "start")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    set_tau(model, 0.4)
    before = moe_layers(model)["bert.encoder.layer.0.intermediate"].w_up.clone()
    ids = TINY["bert classifier"].batch()["input_ids"]
    data = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(moe_layers(model)["bert.encoder.layer.0.intermediate"].w_up, before)
    trainer.save_model(str(tmp_path / "end"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "end")
    assert same(loaded, model.eval(), "bert classifier")


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def garbage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"hello " * 50)


def lacks_a_tensor(path: Path) -> None:
    edit_weights(path, lambda tensors, key: tensors.pop(key))


def dense_weights(path: Path) -> None:
    TINY["bert"].model().save_pretrained(path / "dense")
    (path / "dense" / "model.safetensors").replace(path / "model.safetensors")


def of_another_model(path: Path) -> None:
    """Under other names, none of which a layer has."""
    weights = load_file(path / "model.safetensors")
    save_file(
        {f"other.{key}": tensor for key, tensor in weights.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )


def newer(path: Path) -> None:
    edit_config(path, lambda config: config.update(format=2))


def without_layers(path: Path) -> None:
    edit_config(path, lambda config: config.pop("layers"))


def unknown_field(path: Path) -> None:
    edit_config(path, lambda config: config.update(bits=4))


def other_names(path: Path) -> None:
    edit_config(path, lambda c: c.update(layers={f"body.{name}": d for name, d in c["layers"].items()}))


def broken_layer(path: Path) -> None:
    edit_config(path, lambda config: next(iter(config["layers"].values())).pop("experts"))


def other_sizes(path: Path) -> None:
    edit_config(path, lambda config: next(iter(config["layers"].values())).update(experts=5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"model\.safetensors is no safetensors file, or is cut short"),
        (garbage, r"model\.safetensors is no safetensors file, or is cut short"),
        (
            lacks_a_tensor,
            r"the weights are incomplete: encoder\.layer\.0\.intermediate\.w_up is not in the file",
        ),
        (of_another_model, r"the weights are incomplete: encoder\.layer\.0\.intermediate\.w_up and 13 more"),
        (
            dense_weights,
            r"the weights are incomplete: encoder\.layer\.0\.intermediate\.w_up and 13 more are not",
        ),
        (newer, r"quantization_config of config\.json has format 2, this sadmoe reads 1: update sadmoe"),
        (without_layers, r"quantization_config of config\.json is damaged: it must have layers by name$"),
        (unknown_field, r"it must have layers by name, and not bits"),
        (
            other_names,
            r"this BertModel: it has no body\.encoder\.layer\.0\.intermediate, nor any other of the 2",
        ),
        (
            broken_layer,
            r"config\.json does not fit this BertModel: encoder\.layer\.0\.intermediate: its description",
        ),
        (other_sizes, "has 60 neurons in this model, 5 x 10 in the one saved"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(damage, message, tmp_path):
    described("bert").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(SavedModelError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    described("bert").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors, key: tensors.update({key: tensors[key][1:].clone()}))
    with pytest.raises((RuntimeError, SavedModelError), match=r"mismatched|do not fit"):
        transformers.AutoModel.from_pretrained(tmp_path)
    model = described("bert")  # where transformers leaves it to the quantizer
    wrong = {"encoder.layer.0.intermediate.w_up": torch.Size([1, 2, 3])}
    with pytest.raises(SavedModelError, match=r"intermediate\.w_up is \[6, 10, 24\], not \[1, 2, 3\]"):
        _check_loaded(model, wrong, from_files=False)


def test_a_dense_checkpoint_is_not_converted_on_the_way_in(tmp_path):
    TINY["bert"].model().save_pretrained(tmp_path)
    config = SadmoeConfig(described("bert").config.quantization_config.layers)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_quantized_by_others_keeps_its_quantizer_and_says_so(caplog):
    class Other(SadmoeQuantizer.__base__):
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

    model = converted("bert")
    model.hf_quantizer = Other(SadmoeConfig({"x": {}}))
    sadmoe.hf.describe_to_transformers(model)
    assert isinstance(model.hf_quantizer, Other)
    assert (
        "BertModel is quantized by Other: save_pretrained will not save that it was converted" in caplog.text
    )


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
    assert _found_in(model, {saved: "what it is"}) == {here: "what it is"}
    with pytest.raises(SavedModelError, match="does not fit this Module"):
        _found_in(model, {f"other.{saved}": "what it is"})


def test_sadmoe_may_be_imported_before_transformers(tmp_path):
    model = described("bert")
    model.save_pretrained(tmp_path)
    torch.save([TINY["bert"].batch(), call(model, TINY["bert"].batch())], tmp_path / "expected.pt")
    code = f"""
import sadmoe, sys, torch
assert "transformers" not in sys.modules
torch.set_num_threads({torch.get_num_threads()})
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r})
batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(**batch)[0], expected)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "sadmoe.hf"]
module = sys.modules["transformers.modeling_utils"]
assert type(module.__loader__) is type(module.__spec__.loader) is type(torch.__spec__.loader)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "LOAD REPORT" not in result.stderr


def test_sadmoe_may_be_imported_after_transformers(monkeypatch):
    imported: list[str] = []
    monkeypatch.setattr(sadmoe.hf.importlib, "import_module", imported.append)
    assert "transformers.modeling_utils" in sys.modules
    sadmoe.hf.register()
    assert imported == ["sadmoe.hf.quantizer", "sadmoe.hf.experts"]


def test_a_transformers_that_is_too_old_is_a_warning_and_not_an_error(monkeypatch):
    def fails(name: str) -> None:
        raise ImportError("cannot import name 'register_quantizer'")

    monkeypatch.setattr(sadmoe.hf.importlib, "import_module", fails)
    with pytest.warns(
        UserWarning, match=r"cannot register with this version of transformers .*register_quantizer.*"
    ):
        sadmoe.hf.register()


def test_registering_again_changes_nothing():
    before = list(sadmoe.undo.after_surgery), list(sys.meta_path)
    sadmoe.hf.register()
    assert (list(sadmoe.undo.after_surgery), list(sys.meta_path)) == before


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


class Mine:
    """A gate that no file can hold."""

    true_norms = False

    def mask(self, scores):
        return scores > 0


def test_a_gate_of_the_user_s_own_stops_saving_and_nothing_else(tmp_path, caplog):
    model = converted("bert")
    first, second = moe_layers(model).values()
    first.gate = Mine()
    sadmoe.quantize_experts_(model)
    assert second.is_int8
    assert "save_pretrained will refuse this model as it is now: a gate of type Mine" in caplog.text
    sadmoe.dequantize_experts_(model)
    with pytest.raises(NotImplementedError, match="a gate of type Mine cannot be saved"):
        model.save_pretrained(tmp_path)
    first.gate = DynamicK(0.3)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert [layer.gate for layer in moe_layers(loaded).values()] == [DynamicK(0.3), second.gate]
