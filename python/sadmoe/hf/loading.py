"""What a converted model needs before from_pretrained loads its weights, and after."""

import ctypes
import logging
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sadmoe.ffn import bare_mlps, moe_layers, projection_mlps, replaced_module, site_of
from sadmoe.ffn.lookup import join
from sadmoe.saving import SavedModelError

logger = logging.getLogger(__name__)
CACHE_LINE = 64  # bytes, to which torch aligns what it allocates


def check_safetensors(path: Path) -> None:
    """Raises SavedModelError unless `path` is a safetensors file of the length that its header says."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise SavedModelError(f"{path} is no safetensors file, or is cut short: {error}") from error


def warn_of_float16(model: Any) -> None:
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


def layer_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """By their names in the model, those of converted layers and of the MLPs in the place of projections."""
    return {
        f"{name}.{key}": tensor
        for name, layer in (*moe_layers(model).items(), *bare_mlps(model).items())
        for key, tensor in layer.state_dict(keep_vars=True).items()
    }


def leave_owners_alone(model: nn.Module) -> None:
    """Keeps transformers from initialising modules whose linear layers are MoE layers or MLPs: some read the weights
    (GPT-2's and T5's attention, GroupViT's mixer). What they hold is all in the file, or `check_loaded` says so. Not
    those that hold an FFN whole, or buffers of their own, which are made when they are initialised (GPT-Neo, SAM 3)."""

    def owner(name: str) -> Any:
        return model.get_submodule(name.rpartition(".")[0])

    inside = [name for name, layer in moe_layers(model).items() if site_of(layer).parts.at]
    for name in (*projection_mlps(model), *inside):
        if not owner(name)._buffers:
            owner(name)._is_hf_initialized = True


def show_replaced(model: nn.Module) -> list[tuple[nn.Module, str]]:
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


def check_loaded(model: nn.Module, shapes: dict[str, torch.Size], from_files: bool) -> None:
    """Raises SavedModelError where weights of a converted layer were not in the file, or of other shapes.

    transformers marks what it loaded, fills in what it did not with random numbers and a report, and (5.0)
    leaves the shapes of a quantized model to its quantizer. What a device_map puts elsewhere until it runs has no mark;
    nor has anything that is loaded in a way of its own, unless from files, none of which then fits the layers.
    """
    tensors = layer_tensors(model)
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


def whole_again(model: nn.Module, whole: dict[str, torch.dtype]) -> None:
    """Gives whole numbers, such as experts in int8, their dtype back: where a model keeps something in float32,
    transformers (before 5.22) makes that of all whose name has it in it. None is too large for float32 to hold."""
    for name, tensor in layer_tensors(model).items():
        if name in whole and tensor.dtype != whole[name]:
            tensor.requires_grad_(False)
            tensor.data = tensor.data.to(whole[name])


def align(model: nn.Module, files: list[range]) -> None:
    """Copies the weights of converted layers that do not start at a cache line, as those mapped from a file: vectors
    that straddle two lines cost the kernels a fifth of their speed. One tensor at a time; what was mapped is let go."""
    for tensor in layer_tensors(model).values():
        if tensor.device.type == "cpu" and tensor.data_ptr() % CACHE_LINE:
            mapped, tensor.data = tensor.data, tensor.data.clone()
            _let_go(mapped, files)


def mapped_files() -> list[range]:
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
