"""What the converted layers that config.json names are called in the model that is built."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import transformers

from sadmoe.saving import SavedModelError

_LANGUAGE = re.compile(r"^(model\.)?language_model\.")


def found_in(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
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
