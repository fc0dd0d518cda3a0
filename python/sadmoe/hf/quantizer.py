"""The classes by which transformers knows a quantization method. Only `hf` imports this."""

import logging
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sadmoe.convert import restore_
from sadmoe.describe import describe_all, match_activations, rebuild
from sadmoe.ffn import configs_in, join_configs, moe_layers, parted_configs
from sadmoe.hf.loading import (
    align,
    check_loaded,
    check_safetensors,
    layer_tensors,
    leave_owners_alone,
    mapped_files,
    show_replaced,
    warn_of_float16,
    whole_again,
)
from sadmoe.hf.names import found_in
from sadmoe.saving import FORMAT, SavedModelError
from sadmoe.weights import check_can_be_saved, check_parameters

logger = logging.getLogger(__name__)
_LAYER_CLASS = "DynamicKMoE"

METHOD = "sadmoe"


@register_quantization_config(METHOD)
class SadmoeConfig(QuantizationConfigMixin):
    """What config.json holds of a converted model.

    layers: name of each converted FFN -> what `describe.describe` says of it.   format: version of that.
    """

    def __init__(self, layers: dict[str, Any] | None = None, format: int = FORMAT, **unknown: Any):
        unknown.pop("quant_method", None)
        if format != FORMAT:
            raise SavedModelError(
                f"quantization_config of config.json has format {format}, this sadmoe reads {FORMAT}: "
                "update sadmoe"
            )
        if unknown or not isinstance(layers, dict) or not layers:
            raise SavedModelError(
                "quantization_config of config.json is damaged: it must have layers by name"
                + (f", and not {', '.join(sorted(unknown))}" if unknown else "")
            )
        self.quant_method: Any = METHOD
        self.format = format
        self.layers = layers

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dict in config.json, which from_pretrained(config=...) takes it for."""
        return getattr(self, key, default)


@register_quantizer(METHOD)
class SadmoeQuantizer(HfQuantizer):
    """Cuts the model that from_pretrained has built, before the weights come; keeps its config true.

    A model that has it is not quantized in any other sense: it trains, casts, compiles and moves as before.
    """

    # So a dense checkpoint cannot be converted on the way in: convert_ needs batches.
    requires_calibration = True
    # Experts are plain parameters; experts in int8, and routers, which `fit_routers_` trains, stay.
    is_trainable = True
    # Else Trainer would ask for adapters.
    is_qat_trainable = True
    # The ops have no graph break.
    is_compileable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes: plain tensors, and what config.json says."""
        return True

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, str]]:
        """save_pretrained calls it before it writes config.json: the moment to note the present tau. What it returns
        takes the place of the state_dict that save_pretrained was given, and is therefore that one."""
        _describe(model)
        caller = sys._getframe(1)  # transformers passes it to no quantizer
        return caller.f_locals.get("state_dict") if caller.f_code.co_name == "save_pretrained" else None, {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or ()
        for file in files:
            check_safetensors(Path(file))
        # and not from tensors of the caller's, which may be mapped, and changed since
        self._from_files = bool(files)
        config: Any = self.quantization_config
        layers = found_in(model, config.layers)
        try:
            match_activations(model, layers)
            for name, description in layers.items():
                rebuild(model, name, description)
        except ValueError as error:
            raise SavedModelError(f"config.json does not fit this {type(model).__name__}: {error}") from error
        warn_of_float16(model)
        # device_map: an expert's matrices are read in one call, as those of a linear layer
        if moe_layers(model):
            model._no_split_modules = {*(model._no_split_modules or ()), _LAYER_CLASS}
        leave_owners_alone(model)
        self._shown = show_replaced(model)
        tensors = layer_tensors(model)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._whole = {name: t.dtype for name, t in tensors.items() if not t.is_floating_point()}
        # Older ones of transformers, without get_new_dtype, keep weights whose names they change in the dtype of the
        # file, whichever was asked for, unless pre_quantized is False: then they read it in one thread.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.pre_quantized = True
        for layer, name in self._shown:
            del layer.__dict__[name]
        check_loaded(model, self._shapes, self._from_files)
        whole_again(model, self._whole)
        align(model, mapped_files() if self._from_files else [])
        for layer in moe_layers(model).values():
            # as it was made: transformers lets all that it loads ask for gradients
            layer.router.requires_grad_(False)
        # for these transformers refuses half() and training
        model.__dict__.pop("is_quantized", None)
        model.__dict__.pop("quantization_method", None)
        for module in _transformers_models(model):
            module.config.__dict__.pop("_is_quantized", None)
        _describe_each(_transformers_models(model))
        return model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """`model.dequantize()`: the dense FFNs come back, see `restore_`; then the model is cast to dtype."""
        restore_(model)
        return model if dtype is None else model.to(dtype)


def describe_in_configs(model: nn.Module) -> None:
    """Gives each transformers model in `model` the config and the quantizer its converted layers ask for.

    The config is a copy of its own: another model may hold the one it had.
    """
    models = _transformers_models(model)
    if not models:
        return
    if describe_all(model) or any(_says_converted(module) for module in models) or parted_configs(model):
        join_configs(model)
        _describe_each(models)


def _describe_before_saving() -> None:
    """Has save_pretrained look first: a model may have been converted as a part of another, or be a dense one that was
    built from the config of a converted model."""
    save = PreTrainedModel.save_pretrained

    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            layers = moe_layers(self)
            check_parameters(layers)  # what stands for others could not be loaded
            if not getattr(self, "_hf_peft_config_loaded", False):  # then the adapter alone is saved
                check_can_be_saved(self, layers)
        describe_in_configs(self)
        return save(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


_describe_before_saving()


def _describe_each(models: list[Any]) -> None:
    foreign = {id(module.config) for module in models if _quantized_by_others(module)}
    for module in reversed(models):  # the outermost last: parts often share its config
        if id(module.config) not in foreign or _quantized_by_others(module):
            _describe(module)


def _quantized_by_others(model: Any) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not isinstance(quantizer, SadmoeQuantizer)


def _describe(model: Any) -> None:
    layers = describe_all(model)
    if layers and _quantized_by_others(model):
        logger.warning(
            "%s is quantized by %s: save_pretrained will not save that it was converted too; use sadmoe.save",
            type(model).__name__,
            type(model.hf_quantizer).__name__,
        )
    elif layers:
        model.config.quantization_config = SadmoeConfig(layers)
        model.hf_quantizer = SadmoeQuantizer(model.config.quantization_config)
    else:
        if _says_converted(model):
            del model.config.quantization_config
        if isinstance(getattr(model, "hf_quantizer", None), SadmoeQuantizer):
            del model.hf_quantizer
            model._no_split_modules = {*(getattr(model, "_no_split_modules", None) or ())} - {_LAYER_CLASS}


def _says_converted(model: Any) -> bool:
    said = getattr(model.config, "quantization_config", None)
    return isinstance(said, SadmoeConfig) or (isinstance(said, dict) and said.get("quant_method") == METHOD)


def _transformers_models(model: nn.Module) -> list[Any]:
    """Those in it, and the outermost module of any other class that has a config of its own, which a model of that part
    is loaded by (GroupViT's vision transformer)."""
    found: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    seen = {id(module.config) for module in found}
    for config, owners in configs_in(model):
        if id(config) not in seen:
            found.append(model.get_submodule(owners[0]))
    return found
