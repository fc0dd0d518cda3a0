"""transformers: a converted model saves with save_pretrained, and from_pretrained brings it back.

It works as the quantization methods of transformers do: config.json says, under "quantization_config" with
quant_method "sadmoe", how each FFN was cut, and from_pretrained cuts the model that it has built on the meta
device before it loads the weights. No remote code, only safetensors. `quantizer` has the classes for that.

`experts` lets stock MoE models run on sadmoe's kernels, `trainer` has the callbacks for sparsity fine-tuning and
for fitting routers.

transformers is never imported from here: `register` waits until somebody else has imported it.
"""

import importlib
import importlib.abc
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from sadmoe.undo import after_surgery

logger = logging.getLogger(__name__)
MODELS = "transformers.modeling_utils"  # every model imports it, and it has all that registering needs
QUANTIZER = "sadmoe.hf.quantizer"
EXPERTS = "sadmoe.hf.experts"
_refusal: ImportError | None = None  # of the last time that it was tried


def register() -> None:
    """Makes sadmoe known to transformers: at once if that is imported, else as soon as it is. Repeatable."""
    if describe_to_transformers not in after_surgery:
        after_surgery.append(describe_to_transformers)
    if MODELS in sys.modules:
        _import_parts()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def describe_to_transformers(model: nn.Module) -> None:
    """Makes every transformers model in `model` (itself, or a part) say in its config what is converted.

    Called after each conversion, load and restoration: a model without converted FFNs says nothing again. What cannot
    be described, such as a gate of the user's own, is for save_pretrained to refuse, and stops nothing else.
    """
    if QUANTIZER not in sys.modules:  # there is no transformers model
        return
    try:
        importlib.import_module(QUANTIZER).describe_in_configs(model)
    except (NotImplementedError, ValueError) as error:
        logger.warning("save_pretrained will refuse this model as it is now: %s", error)


def check_registered() -> None:
    """Raises ImportError where transformers was imported, and sadmoe could not register with it."""
    if _refusal is not None:
        raise ImportError(
            f"sadmoe cannot register with this version of transformers ({_refusal}), so it neither saves nor loads "
            "converted models in its folders: update transformers"
        )


def _import_parts() -> None:
    global _refusal
    _refusal = None
    try:
        importlib.import_module(QUANTIZER)
        importlib.import_module(EXPERTS)
    except ImportError as error:  # inside somebody's import of transformers, which must go on
        _refusal = error
        warnings.warn(
            f"sadmoe cannot register with this version of transformers ({error}): of a converted model save_pretrained "
            "writes, and from_pretrained loads, what is no such model, so use sadmoe.save and sadmoe.load; or update "
            "transformers",
            stacklevel=2,
        )


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and has the quantizer imported right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        finders = (finder for finder in others if hasattr(finder, "find_spec"))  # which those of old lack
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Stands in for the loader of a module until it has run."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]
        _import_parts()
