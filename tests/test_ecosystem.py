"""Converted models in what people run models with: generate, pipelines, sentence-transformers, PEFT, torch.compile."""

import copy
import functools
import json

import pytest
import sadmoe
import torch
from converted import converted
from tiny_models import TINY, call, pixels, tokens
from torch import nn

transformers = pytest.importorskip("transformers")

ROUTER = sadmoe.RouterConfig(steps=2, width=4)
SMALL = {"height": 16, "width": 16}


def full(name: str) -> nn.Module:
    """A tiny model with FFNs and projections of attention converted, tau 0.2."""
    return copy.deepcopy(fully_converted(name))


@functools.cache
def fully_converted(name: str) -> nn.Module:
    model, batch = TINY[name].model(), TINY[name].batch()
    sadmoe.replace_projections_(model, [batch], sadmoe.ProjectionConfig(steps=2, multiple=4), progress=False)
    config = sadmoe.ConvertConfig(expert_size=4, tau=0.2, router=ROUTER)
    sadmoe.convert_(model, [batch], config, progress=False)
    return model


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "opt", "qwen3", "t5"])
@pytest.mark.parametrize("make", [converted, full])
def test_generate_with_a_cache_gives_the_tokens_of_one_without(make, name):
    model = make(name)
    model.generation_config.decoder_start_token_id = 0 if name == "t5" else None
    sadmoe.set_tau(model, 0.2)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(**tokens(), **settings, use_cache=cache) for cache in (True, False))
    assert with_cache.shape[1] >= 9
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "opt", "qwen3", "phi3", "t5", "t5 v1.1"])
def test_a_saved_model_generates_what_it_did(name, tmp_path):
    model = full(name)
    model.generation_config.decoder_start_token_id = 0 if name.startswith("t5") else None
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert len(sadmoe.moe_layers(again)) == len(sadmoe.moe_layers(model)) > len(TINY[name].names)
    assert torch.equal(again.generate(**tokens(), **settings), model.generate(**tokens(), **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cached_step_gives_the_logits_of_the_whole_text(name):
    model, ids = full(name), tokens()["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        rest = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}], ids=["sampling", "beams"])
def test_sampling_and_beams_give_the_tokens_of_the_model_that_was_saved(settings, tmp_path):
    model = full("llama")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    found = []
    for one, cache in ((model, True), (again, True), (again, False)):
        torch.manual_seed(1)
        found.append(
            one.generate(**tokens(), max_new_tokens=4, min_new_tokens=4, use_cache=cache, **settings)
        )
    assert found[0].shape == (2, 13)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---------------------------------------------------------------- pipelines and sentence-transformers


def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(tmp_path / "vocab.txt"))


PIPELINES = {  # of what does not generate
    "bert": "feature-extraction",
    "bert classifier": "text-classification",
    "roberta": "fill-mask",
    "albert": "feature-extraction",
    "vit": "image-classification",
    "dinov2": "image-feature-extraction",
    "dinov2 swiglu": "image-feature-extraction",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_a_saved_model_as_the_one_that_was_saved(name, tmp_path):
    model = full(name)
    model.save_pretrained(tmp_path)
    if TINY[name].batch is pixels:
        image = pytest.importorskip("PIL.Image").new("RGB", (20, 20), (200, 10, 10))
        reads, given = {"image_processor": transformers.ViTImageProcessor(size=SMALL)}, image
    else:
        reads, given = {"tokenizer": tokenizer(tmp_path)}, "w1 w2 [MASK] w3"
    live, again = (
        transformers.pipeline(PIPELINES[name], model=one, device="cpu", **reads)
        for one in (model, type(model).from_pretrained(tmp_path))
    )
    assert len(sadmoe.moe_layers(again.model)) > len(TINY[name].names)
    assert numbers_in(again(given)) == pytest.approx(numbers_in(live(given)), rel=1e-5)
    sadmoe.set_tau(again.model, 1.0)
    assert numbers_in(again(given)) != pytest.approx(numbers_in(live(given)), rel=1e-5)


def numbers_in(told) -> list[float]:
    """All that are in what a pipeline gives."""
    if isinstance(told, dict):
        return numbers_in(list(told.values()))
    if isinstance(told, list):
        return [number for one in told for number in numbers_in(one)]
    return [told] if isinstance(told, int | float) else []


def test_a_pipeline_classifies_text(tmp_path):
    pipe = transformers.pipeline(
        "text-classification", model=full("bert classifier"), tokenizer=tokenizer(tmp_path), device="cpu"
    )
    one, two = pipe(["w1 w2 w3", "w4"])
    assert {one["label"], two["label"]} <= {"LABEL_0", "LABEL_1"}
    ids = pipe.tokenizer("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        expected = pipe.model(**ids).logits.softmax(-1).max().item()
    assert one["score"] == pytest.approx(expected, rel=1e-4)


def test_a_pipeline_generates_text_from_a_saved_model(tmp_path):
    model, names = full("gpt2"), tokenizer(tmp_path)
    model.save_pretrained(tmp_path)
    names.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert len(sadmoe.moe_layers(pipe.model)) == 6
    (found,) = pipe("w1 w2", max_new_tokens=3, do_sample=False, return_tensors=True)
    tokens = found[
        "generated_token_ids"
    ]  # from the prompt's on, with or without special ones, as transformers has it
    wanted = model.generate(torch.tensor([tokens[:-3]]), max_new_tokens=3, do_sample=False)
    assert tokens == wanted[0].tolist()


def test_sentence_transformers_loads_encodes_and_saves_a_converted_encoder(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model, names = full("bert"), tokenizer(tmp_path)
    model.save_pretrained(tmp_path / "encoder")
    names.save_pretrained(tmp_path / "encoder")
    encoder = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    texts = ["w1 w2 w3 w4", "w5"]
    found = encoder.encode(texts, convert_to_tensor=True)
    batch = names(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(found, (hidden * real).sum(1) / real.sum(1), rtol=1e-4, atol=1e-5)
    encoder.save(str(tmp_path / "again"))
    again = library.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert len(sadmoe.moe_layers(again)) == 10
    assert torch.equal(again.encode(texts, convert_to_tensor=True), found)
    sadmoe.set_tau(again, 0.0)
    assert not torch.equal(again.encode(texts, convert_to_tensor=True), found)


# ---------------------------------------------------------------- PEFT


def lora(model: nn.Module, **settings):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))


def train(model: nn.Module, steps: int = 30) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        batch = tokens()
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_on_the_linear_layers_of_a_converted_model_trains(tmp_path):
    peft = pytest.importorskip("peft")
    model = converted("llama")
    sadmoe.hf.describe_to_transformers(model)
    sadmoe.set_tau(model, 0.2)
    model.save_pretrained(tmp_path / "base")
    experts = {name: p.clone() for name, p in model.named_parameters() if ".w_up" in name}
    adapted = lora(model, target_modules=["q_proj", "v_proj"])
    losses = train(adapted)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in experts.items())
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(
        type(model).from_pretrained(tmp_path / "base"), tmp_path / "lora"
    ).eval()
    assert torch.equal(call(again, tokens()), call(adapted.eval(), tokens()))


def test_experts_inside_an_adapter_are_neither_rounded_nor_restored():
    model = converted("llama")
    adapted = lora(model, target_parameters=["mlp.w_up", "mlp.w_down"])
    told = r"mlp.* is inside a ParamWrapper, .*: merge the adapter first"
    for step in (sadmoe.quantize_experts_, sadmoe.restore_):
        with pytest.raises(ValueError, match=told):
            step(adapted)
    sadmoe.quantize_experts_(adapted.merge_and_unload())


def test_copies_that_an_adapter_trains_are_merged_before_they_are_saved(tmp_path):
    adapted = lora(converted("llama"), target_modules=["q_proj"], modules_to_save=["mlp"])
    steps = (
        lambda: sadmoe.save(adapted, tmp_path / "m.safetensors"),
        lambda: adapted.get_base_model().save_pretrained(tmp_path / "m"),
    )
    for step in steps:
        with pytest.raises(ValueError, match=r"mlp is a ModulesToSaveWrapper, .*: merge them first"):
            step()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(call(again.eval(), tokens()), call(merged.eval(), tokens()))


def test_routers_learn_no_norms_of_experts_without_their_adapter(tmp_path):
    adapted = lora(converted("llama"), target_parameters=["mlp.w_up", "mlp.w_down"])
    steps = {
        "fit": lambda: sadmoe.fit_routers_(adapted, [tokens()]),
        "loss": lambda: sadmoe.RouterLoss(adapted),
        "save": lambda: sadmoe.save(adapted, tmp_path / "m.safetensors"),  # which no dense model could load
        "save_pretrained": lambda: adapted.get_base_model().save_pretrained(tmp_path),
    }
    for step in steps.values():
        with pytest.raises(ValueError, match=r"mlp.* is inside a ParamWrapper, .*: merge the adapter first"):
            step()
    assert list(tmp_path.iterdir()) == []
    merged = adapted.merge_and_unload()
    sadmoe.fit_routers_(merged, [tokens()], sadmoe.RouterConfig(width=16, steps=1))
    sadmoe.save(merged, tmp_path / "m.safetensors")


def test_lora_on_the_experts_trains():
    model = converted("llama")
    sadmoe.set_tau(model, 0.2)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapted = lora(model, target_modules=[], target_parameters=["mlp.w_up", "mlp.w_down"])
    losses = train(adapted)
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    moved = [name for name, p in merged.named_parameters() if not torch.equal(p, frozen[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"w_up", "w_down"}


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bert", "aot_eager"), ("vit", "aot_eager"), pytest.param("llama", "inductor", marks=pytest.mark.slow)],
)
def test_a_converted_model_compiles_whole(name, backend):
    model, batch = full(name), TINY[name].batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(call(compiled, batch), call(model, batch), rtol=1e-4, atol=1e-4)


def test_no_graph_break_in_a_converted_model():
    model, batch = full("bert"), TINY["bert"].batch()
    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(call(traced, batch), call(model, batch))


def test_its_config_says_what_is_converted(tmp_path):
    full("llama").save_pretrained(tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert sum(layer["ffn"]["adapter"] == "projection" for layer in layers.values()) == 8
