"""The classes by which transformers knows a quantization method. Only `hf` imports this."""

import ctypes
import logging
import mmap
import re
import sys
from collections.abc import Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sadmoe.convert import restore_
from sadmoe.describe import describe_all, match_activations, rebuild
from sadmoe.ffn import (
    bare_mlps,
    configs_in,
    join_configs,
    moe_layers,
    parted_configs,
    projection_mlps,
    replaced_module,
    site_of,
)
from sadmoe.ffn.lookup import join
from sadmoe.saving import FORMAT, SavedModelError
from sadmoe.weights import check_no_adapters, check_parameters

logger = logging.getLogger(__name__)
_LANGUAGE = re.compile(r"^(model\.)?language_model\.")
_LAYER_CLASS = "DynamicKMoE"
CACHE_LINE = 64  # bytes, to which torch aligns what it allocates

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
            _check_safetensors(Path(file))
        # and not from tensors of the caller's, which may be mapped, and changed since
        self._from_files = bool(files)
        config: Any = self.quantization_config
        layers = _found_in(model, config.layers)
        try:
            match_activations(model, layers)
            for name, description in layers.items():
                rebuild(model, name, description)
        except ValueError as error:
            raise SavedModelError(f"config.json does not fit this {type(model).__name__}: {error}") from error
        _warn_of_float16(model)
        # device_map: an expert's matrices are read in one call, as those of a linear layer
        if moe_layers(model):
            model._no_split_modules = {*(model._no_split_modules or ()), _LAYER_CLASS}
        _leave_owners_alone(model)
        self._shown = _show_replaced(model)
        tensors = _layer_tensors(model)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._whole = {name: t.dtype for name, t in tensors.items() if not t.is_floating_point()}
        # Older ones of transformers, without get_new_dtype, keep weights whose names they change in the dtype of the
        # file, whichever was asked for, unless pre_quantized is False: then they read it in one thread.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.pre_quantized = True
        for layer, name in self._shown:
            del layer.__dict__[name]
        _check_loaded(model, self._shapes, self._from_files)
        _whole_again(model, self._whole)
        _align(model, _mapped_files() if self._from_files else [])
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
                check_no_adapters(self, layers)
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


def _found_in(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """The layers by their names in this model, which may be a part of the model saved, or have it as a part.

    As for weights: BertForMaskedLM calls "bert.encoder" what BertModel calls "encoder", and an encoder alone
    can be loaded from an encoder-decoder, the language model from one of images and text. Raises SavedModelError where
    the model has none of them, or a part of it calls some otherwise, which would then stay dense, at random.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}
    renamed = [
        layers,
        *(
            {before + name: d for name, d in layers.items()}
            for before in (prefix, *_only_prefix(names, layers))
        ),
        {name.removeprefix(prefix): description for name, description in layers.items()},
        {_LANGUAGE.sub(r"\1", name): description for name, description in layers.items()},
    ]
    way = max(renamed, key=lambda way: len(way.keys() & names))
    found = {name: description for name, description in way.items() if name in names}
    if not found:
        raise SavedModelError(
            f"config.json does not fit this {type(model).__name__}: it has no {next(iter(layers))}, nor any "
            f"other of the {len(layers)} converted layers" + _other_version(model)
        )
    for name in sorted(way.keys() - names):
        part = _deepest(name, names)
        rest = name.removeprefix(f"{part}.")
        in_a_block = any(piece.isdigit() for piece in part.split("."))
        # Else it was left out with all that it is in, as the decoder is of an encoder alone, or a block of fewer.
        if not rest[0].isdigit() and (
            in_a_block or (part and not any(n.startswith(f"{part}.") for n in found))
        ):
            raise SavedModelError(
                f"config.json does not fit this {type(model).__name__}: its {part} has no {rest}, which is converted"
                + _other_version(model)
            )
    return found


def _only_prefix(names: Collection[str], layers: Mapping[str, Any]) -> set[str]:
    """What stands before the layers' names in this model, if that is one and the same (OwlViT's vision model, whose
    config is that of a module in it)."""
    first = f".{next(iter(layers))}"
    found = {name.removesuffix(first) + "." for name in names if name.endswith(first)}
    return found if len(found) == 1 else set()


def _deepest(name: str, names: Collection[str]) -> str:
    """The innermost module of the model that a name leads to; "" where its first part is not there."""
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
    return next((path for path in paths if path in names), "")


def _other_version(model: Any) -> str:
    """What may be why, as a model's parts are called otherwise in some versions of transformers."""
    saved_by = getattr(getattr(model, "config", None), "transformers_version", None)
    if saved_by in (None, transformers.__version__):
        return ""
    here = transformers.__version__
    return f"; it was saved by transformers {saved_by}, this is {here}, which may name them otherwise"


def _whole_again(model: nn.Module, whole: dict[str, torch.dtype]) -> None:
    """Gives whole numbers, such as experts in int8, their dtype back: where a model keeps something in float32,
    transformers (before 5.22) makes that of all whose name has it in it. None is too large for float32 to hold."""
    for name, tensor in _layer_tensors(model).items():
        if name in whole and tensor.dtype != whole[name]:
            tensor.requires_grad_(False)
            tensor.data = tensor.data.to(whole[name])


def _warn_of_float16(model: Any) -> None:
    """Some models keep linear layers in float32 when they are loaded in float16, which a MoE layer in their place does
    not (T5's wo)."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    layers = {
        name: layer
        for name, layer in moe_layers(model).items()
        if layer.w_down.dtype == torch.float16 and not kept & set(name.split("."))  # else it is kept, too
    }
    sites = [site_of(layer, name) for name, layer in layers.items()]
    linears = {join(site.block, part) for site in sites for part in (site.parts.up, site.parts.down)}
    if protected := sorted(name for name in linears if kept & set(name.split("."))):
        logger.warning(
            "%s: %s keeps it in float32, where its converted layer is loaded in float16 and may overflow: load it in "
            "bfloat16 or float32",
            protected[0],
            type(model).__name__,
        )


def _layer_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in (*moe_layers(model).items(), *bare_mlps(model).items())
        for key, tensor in layer.state_dict(keep_vars=True).items()
    }


def _leave_owners_alone(model: nn.Module) -> None:
    """Keeps transformers from initialising modules whose linear layers are MoE layers or MLPs: some read the weights
    (GPT-2's and T5's attention, GroupViT's mixer). What they hold is all in the file, or `_check_loaded` says so. Not
    those that hold an FFN whole, or buffers of their own, which are made when they are initialised (GPT-Neo, SAM 3)."""

    def owner(name: str) -> Any:
        return model.get_submodule(name.rpartition(".")[0])

    inside = [name for name, layer in moe_layers(model).items() if site_of(layer).parts.at]
    for name in (*projection_mlps(model), *inside):
        if not owner(name)._buffers:
            owner(name)._is_hf_initialized = True


def _show_replaced(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Lets the converted layers have the parts of the FFNs that they replaced, which hold no data, and says which:
    modules further out may initialise these (V-JEPA 2's pooler)."""
    shown: list[tuple[nn.Module, str]] = []
    for layer in moe_layers(model).values():
        ffn = replaced_module(layer)
        for name, part in () if ffn is None else ffn.named_children():
            if name not in {*layer.__dict__, *layer._modules, *layer._parameters, *layer._buffers}:
                layer.__dict__[name] = part
                shown.append((layer, name))
    return shown


def _align(model: nn.Module, files: list[range]) -> None:
    """Copies the weights of converted layers that do not start at a cache line, as those mapped from a file: vectors
    that straddle two lines cost the kernels a fifth of their speed. One tensor at a time; what was mapped is let go."""
    for tensor in _layer_tensors(model).values():
        if tensor.device.type == "cpu" and tensor.data_ptr() % CACHE_LINE:
            mapped, tensor.data = tensor.data, tensor.data.clone()
            _let_go(mapped, files)


def _mapped_files() -> list[range]:
    """The addresses of this process that are mapped from files; none where the system does not tell."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    spans = [span.split("-") for span, _, _, _, inode, *_ in lines if inode != "0"]
    return [range(int(begin, 16), int(end, 16)) for begin, end in spans]


def _let_go(tensor: torch.Tensor, files: list[range]) -> None:
    """Takes a tensor's whole pages out of this process, if they are of a file: else they stay beside their copy as long
    as the file is mapped. Who reads them again gets them from the file, which the system still holds."""
    page, begin = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
    if first < last and any(first in file and last - 1 in file for file in files):
        size = ctypes.c_size_t(last - first)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), size, mmap.MADV_DONTNEED)


def _check_loaded(model: nn.Module, shapes: dict[str, torch.Size], from_files: bool) -> None:
    """Raises SavedModelError where weights of a converted layer were not in the file, or of other shapes.

    transformers marks what it loaded, fills in what it did not with random numbers and a report, and (5.0)
    leaves the shapes of a quantized model to its quantizer. What a device_map puts elsewhere until it runs has no mark;
    nor has anything that is loaded in a way of its own, unless from files, none of which then fits the layers.
    """
    tensors = _layer_tensors(model)
    elsewhere = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    marks = any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
    missing = [
        name
        for name, tensor in tensors.items()
        if not getattr(tensor, "_is_hf_initialized", False)
        and not tensor.is_meta
        and name.rpartition(".")[0] not in elsewhere
    ]
    if missing and (marks or (from_files and len(missing) == len(tensors))):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise SavedModelError(f"the weights are incomplete: {missing[0]}{more} not in the file")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise SavedModelError(
                f"the weights do not fit config.json: {name} is {list(tensors[name].shape)}, not {list(shape)}"
            )


def _check_safetensors(path: Path) -> None:
    """Raises SavedModelError unless `path` is a safetensors file of the length that its header says."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise SavedModelError(f"{path} is no safetensors file, or is cut short: {error}") from error
