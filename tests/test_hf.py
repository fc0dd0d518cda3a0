import copy
import io
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
import sadmoe
import sadmoe.hf
from converted import converted
from hf_models import config_of, described, same
from sadmoe import load, moe_layers, restore_, save, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.hf.quantizer import SadmoeConfig
from tiny_models import TINY, call, tokens

pytestmark = pytest.mark.usefixtures("loud")
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


def tower_alone(change, model, tower, tmp_path):
    """The model after a change of a part of it, and as it is saved whole and loaded again."""
    transformers.logging.set_verbosity_error()
    change(model.get_submodule(tower), [{"input_ids": torch.randint(5, 49, (2, 6))}])
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path)


def sparsified(part, batches):
    sadmoe.sparsify_(part, batches, sadmoe.SparsifyConfig(steps=1), progress=False)


def cut(part, batches):
    config = sadmoe.ConvertConfig(expert_size=5, router=sadmoe.RouterConfig(width=4, steps=5))
    sadmoe.convert_(part, batches, config, progress=False)


@pytest.mark.parametrize("name", ["clip", "clip twice"])
def test_a_whole_model_is_saved_with_the_activation_that_a_part_was_given(name, tmp_path):
    model = TINY["clip"].model()
    again = tower_alone(sparsified, model, "text_model", tmp_path)
    if name == "clip twice":  # what was loaded has a config of its own, and so has what is saved once more
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
    assert config_of(tmp_path)["text_config"]["hidden_act"] == "relu"
    assert config_of(tmp_path)["vision_config"]["hidden_act"] == "quick_gelu"
    assert same(model, again, "clip")


def test_a_head_is_saved_with_the_activation_that_its_body_was_given(tmp_path):
    model = transformers.BertForSequenceClassification(TINY["bert"].model().config).eval()
    again = tower_alone(sparsified, model, "bert", tmp_path)
    assert again.config.hidden_act == "relu"
    assert same(model, again, "bert")


def test_a_save_between_two_changes_of_a_body_loses_none(tmp_path):
    model = transformers.BertForSequenceClassification(TINY["bert"].model().config).eval()
    tower_alone(cut, model, "bert", tmp_path)
    sadmoe.restore_(model)
    again = tower_alone(sparsified, model, "bert", tmp_path)
    assert again.config.hidden_act == "relu"
    assert same(model, again, "bert")


def test_what_a_head_still_uses_is_kept_in_the_config_and_told(tmp_path, caplog):
    model = transformers.BertForMaskedLM(TINY["bert"].model().config).eval()
    tower_alone(sparsified, model, "bert", tmp_path)
    assert config_of(tmp_path)["hidden_act"] == "gelu"
    assert "the config keeps hidden_act=gelu, as cls.predictions" in caplog.text


def test_a_tower_that_was_converted_alone_is_read_from_the_whole_model(tmp_path):
    model = TINY["clip"].model()
    again = tower_alone(cut, model, "text_model", tmp_path)
    assert same(model, again, "clip")
    tower = transformers.CLIPTextModel.from_pretrained(tmp_path)
    assert len(sadmoe.moe_layers(tower)) == len(sadmoe.moe_layers(model))
    ids = torch.randint(5, 49, (2, 6))
    assert torch.equal(tower(ids).pooler_output, model.text_model(ids).pooler_output)


def test_both_names_of_activations_follow_in_the_config(tmp_path):
    config = transformers.MoonshineConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.MoonshineForConditionalGeneration(config).eval()
    batch = {"input_values": torch.randn(2, 2000), "decoder_input_ids": torch.randint(5, 90, (2, 6))}
    sadmoe.sparsify_(model, [batch], sadmoe.SparsifyConfig(steps=1), progress=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_an_activation_that_no_config_names_is_told(caplog):
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=24, n_layer=1, n_head=4)
    model, ids = transformers.BloomModel(bloom), {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    sadmoe.sparsify_(model, [ids], sadmoe.SparsifyConfig(steps=1, objective="distill_hidden"), progress=False)
    assert "the config of this BloomModel has no name for the activation of h.0.mlp" in caplog.text


def test_sadmoe_s_own_files_hold_transformers_models_too(tmp_path):
    model = described("bert")
    save(model, tmp_path / "m.safetensors")
    fresh = TINY["bert"].build().eval()
    load(fresh, tmp_path / "m.safetensors")
    fresh.save_pretrained(tmp_path / "hf")
    assert same(transformers.AutoModel.from_pretrained(tmp_path / "hf"), model, "bert")


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
    report = sadmoe.cost(model, [batch])  # of a batch that goes where the model runs
    assert 0 < report.executed < report.dense
    assert sadmoe.calibrate_(model, [batch], budget=0.9, progress=False).tau >= 0


def test_a_layer_is_not_split_over_devices(tmp_path):
    """DistilBERT does not say what may not be: a linear layer has no parts, but one of ours has a router."""
    pytest.importorskip("accelerate")
    config = transformers.DistilBertConfig(vocab_size=50, dim=32, hidden_dim=128, n_layers=4, n_heads=4)
    model, batch = transformers.DistilBertModel(config).eval(), tokens()
    quick = sadmoe.ConvertConfig(expert_size=16, tau=0.1, router=sadmoe.RouterConfig(steps=1, width=8))
    sadmoe.convert_(model, [batch], quick, progress=False)
    model.save_pretrained(tmp_path / "saved")
    wanted, size = call(model, batch), model.get_memory_footprint()
    for tenths in range(3, 10):
        loaded = transformers.DistilBertModel.from_pretrained(
            tmp_path / "saved",
            device_map="auto",
            max_memory={"cpu": size * tenths // 10},
            offload_folder=tmp_path / "disk",
        )
        assert torch.equal(call(loaded, batch), wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_whole_numbers_stay_where_a_model_keeps_layers_in_float32(int8, tmp_path, caplog, monkeypatch):
    model = described("bert")
    if int8:
        sadmoe.quantize_experts_(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.BertModel, "_keep_in_fp32_modules", ["intermediate"])
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float16)
    layers = moe_layers(loaded).values()
    wanted = {"permutation": torch.int64, "w_up": torch.int8 if int8 else torch.float32}
    assert [{name: getattr(layer, name).dtype for name in wanted} for layer in layers] == [wanted] * 2
    assert not any(layer.w_up.requires_grad for layer in layers) or not int8
    assert "may overflow" not in caplog.text
    for each in (model, loaded):
        restore_(each)
    after = loaded.state_dict()
    assert all(
        torch.allclose(a, after[name].to(a.dtype), atol=1e-2) for name, a in model.state_dict().items()
    )


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

    sadmoe.hf.check_registered()
    monkeypatch.setattr(sadmoe.hf, "_refusal", None)  # and None again afterwards
    monkeypatch.setattr(sadmoe.hf.importlib, "import_module", fails)
    told = r"cannot register with this version of transformers .*register_quantizer.*"
    with pytest.warns(UserWarning, match=told):
        sadmoe.hf.register()
    with pytest.raises(ImportError, match=told):
        sadmoe.hf.check_registered()


def test_finders_of_an_older_kind_are_passed_by(monkeypatch):
    class Old:
        def find_module(self, name, path=None):
            return None

    watcher = sadmoe.hf._Watcher()
    monkeypatch.setattr(sys, "meta_path", [Old(), watcher, *sys.meta_path])
    assert (
        watcher.find_spec("transformers.modeling_utils", transformers.__path__).name
        == "transformers.modeling_utils"
    )


def test_registering_again_changes_nothing():
    before = list(sadmoe.undo.after_surgery), list(sys.meta_path)
    sadmoe.hf.register()
    assert (list(sadmoe.undo.after_surgery), list(sys.meta_path)) == before


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
