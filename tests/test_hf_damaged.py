"""Files of transformers models that are damaged or foreign: one clear error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
import sadmoe
import sadmoe.hf
from converted import converted
from hf_models import config_of, described, edit_config, edit_weights
from sadmoe import SavedModelError
from sadmoe.hf.loading import check_loaded
from sadmoe.hf.quantizer import SadmoeConfig, SadmoeQuantizer
from tiny_models import TINY

pytestmark = pytest.mark.usefixtures("loud")


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


def of_another_transformers(path: Path) -> None:
    other_names(path)
    config = config_of(path) | {"transformers_version": "5.8.1"}
    (path / "config.json").write_text(json.dumps(config))


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
            r"this BertModel: it has no body\.encoder\.layer\.0\.intermediate, nor any other of the 2 [a-z ]+$",
        ),
        (of_another_transformers, r"converted layers; it was saved by transformers 5\.8\.1, this is \d+"),
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
        check_loaded(model, wrong, from_files=False)


def test_a_dense_checkpoint_is_not_converted_on_the_way_in(tmp_path):
    TINY["bert"].model().save_pretrained(tmp_path)
    config = SadmoeConfig(described("bert").config.quantization_config.layers)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=config)


class Other(SadmoeQuantizer.__base__):
    """A quantizer of somebody else's."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True


def test_a_model_quantized_by_others_keeps_its_quantizer_and_says_so(caplog):
    model = converted("bert")
    model.hf_quantizer = Other(SadmoeConfig({"x": {}}))
    sadmoe.hf.describe_to_transformers(model)
    assert isinstance(model.hf_quantizer, Other)
    assert (
        "BertModel is quantized by Other: save_pretrained will not save that it was converted" in caplog.text
    )


def test_what_others_say_in_a_config_that_parts_share_stays():
    model = converted("llama")
    theirs = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model.hf_quantizer, model.config.quantization_config = Other(theirs), theirs
    sadmoe.hf.describe_to_transformers(model)
    assert model.config.quantization_config.load_in_8bit
    sadmoe.restore_(model)
    sadmoe.hf.describe_to_transformers(model)
    assert model.config.quantization_config.load_in_8bit
