"""The swap of one activation for another, in the dense model and in its config."""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from sadmoe import reference
from sadmoe.checks import check_choice
from sadmoe.ffn.activations import ACTIVATION_MODULES, activation_children, which_activation
from sadmoe.ffn.configs import configs_in, own_configs, parted_configs
from sadmoe.ffn.lookup import join, lookup
from sadmoe.ffn.sites import FFNSite
from sadmoe.ffn.surgery import FAST_PATH, put_back, with_hooks
from sadmoe.tables import shortened

logger = logging.getLogger(__name__)

CONFIG_KEYS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "ff_activation",
    "dense_act_fn",
    "mlp_hidden_act",
    "encoder_hidden_act",
    "decoder_hidden_act",
    "prompt_hidden_act",
    "speech_encoder_hidden_act",
    "projector_hidden_act",
    "pooler_hidden_act",
    "memory_attention_mlp_hidden_act",
    "memory_attention_feed_forward_hidden_act",
    "encoder_activation_function",
    "decoder_activation_function",
    "encoder_feedforward_activation",
    "decoder_activation",
    "depth_decoder_activation",
)
CONFIG_VALUES = {  # transformers' names of each activation; the first is written
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "silu": ("silu", "swish"),
    "quick_gelu": ("quick_gelu",),
    "relu2": ("relu2",),
}
Undo = Callable[[], None]


def activation_at(model: nn.Module, site: FFNSite) -> str | None:
    """The key of `reference.ACTIVATIONS` of what is where the site has its activation; None where that is elsewhere."""
    if site.parts.activation is None:
        return None
    return which_activation(lookup(model.get_submodule(site.block), site.parts.activation)[2])


def swap_activations_(
    model: nn.Module, sites: Sequence[FFNSite], act: str = "relu", *, told: bool = True
) -> Undo:
    """Replaces the activation of every site by `act`, in place; call what it returns to undo it.

    A transformers config follows, in a copy of the model's own, so that the dense model can be saved and reloaded;
    unless something beside the sites still uses the old activation (an FFN left out, a head), as the config has one
    name for all, or it has no name for it: both are logged, if told. act: a key of `reference.ACTIVATIONS`.
    Source: the ReLU swap of arXiv 2310.04361, section 3.
    Raises NotImplementedError, with nothing changed, where a forward calls its activation as a function.
    """
    check_choice("act", act, ACTIVATION_MODULES)
    check_swappable(sites, act)
    todo = [site for site in sites if site.act != act]
    old = {site.act for site in todo}
    leaving = [lookup(model.get_submodule(site.block), str(site.parts.activation))[2] for site in todo]
    if told and (hooks := with_hooks(model, leaving)):
        warnings.warn(
            f"{', '.join(shortened(hooks, 5))}: {act} takes their place, and their hooks do not run any more; set them "
            "on what is there now",
            stacklevel=3,
        )
    with ExitStack() as undo:
        for site in todo:
            undo.callback(_swap(model.get_submodule(site.block), site, act))
        if old:
            undo.callback(own_configs(model))
            level = logging.WARNING if told else logging.DEBUG
            _swap_configs(model, todo, old, act, level)  # in copies, which undoing lets go
        return undo.pop_all().close


def check_swappable(sites: Sequence[FFNSite], act: str) -> None:
    """Raises NotImplementedError where a forward calls another activation than `act` as a function."""
    if fixed := [site.name for site in sites if site.act != act and site.parts.activation is None]:
        raise NotImplementedError(
            f"the activation of {', '.join(fixed)} is a function called in forward, which cannot be "
            f"swapped for {act}; make it a module (self.act = nn.GELU()) or an attribute"
        )


def _swap(block: nn.Module, site: FFNSite, act: str) -> Undo:
    path, before = str(site.parts.activation), site.act
    old = lookup(block, path)[2]
    is_module = isinstance(old, nn.Module)
    new = ACTIVATION_MODULES[act]().train(old.training) if is_module else reference.ACTIVATIONS[act]
    changes: dict[str, Any] = {path: new}
    if FAST_PATH in block.__dict__:
        changes[FAST_PATH] = {"relu": 1, "gelu": 2}.get(act, 0)  # what nn.TransformerEncoderLayer calls them
    originals = {key: lookup(block, key)[2] for key in changes}

    def change(values: dict[str, Any], act: str) -> None:
        put_back(block, values)
        site.act = act

    change(changes, act)
    return lambda: change(originals, before)


def _swap_configs(model: nn.Module, sites: Sequence[FFNSite], old: set[str], act: str, level: int) -> None:
    """Each config found in the model follows, if no module under it has one of the old activations left."""
    found = configs_in(model)
    naming: list[str] = []  # modules whose config has a name for it
    for config, owners in found:
        if changes := _config_changes(config, old, act):
            naming += owners
            _change_config(model, config, owners, changes, old, level)
    unnamed = [
        site.name for site in sites if not any(not n or f"{site.name}.".startswith(f"{n}.") for n in naming)
    ]
    if found and unnamed:
        logger.log(
            level,
            "the config of this %s has no name for the activation of %s: a dense model saved now reloads with %s. Save "
            "it converted, or swap again after loading",
            type(model).__name__,
            unnamed[0],
            " and ".join(sorted(old)),
        )


def _change_config(
    model: nn.Module, config: Any, owners: list[str], changes: dict[str, str], old: set[str], level: int
) -> None:
    left = [user for owner in owners for user in _users(model.get_submodule(owner), owner, old)]
    if left:
        logger.log(
            level,
            "the config keeps %s, as %s uses it too: a dense model saved now reloads with it everywhere",
            ", ".join(f"{key}={getattr(config, key)}" for key in changes),
            left[0],
        )
        return
    for key, value in changes.items():
        setattr(config, key, value)


def join_configs(model: nn.Module) -> None:
    """`own_configs`, and those of the whole model follow what was swapped in a part of it alone."""
    parted = [
        (owners, *_swapped(origin, own))
        for origin, own in parted_configs(model)
        for config, owners in configs_in(model)
        if config is origin
    ]
    own_configs(model)
    for owners, old, act in parted:
        config = model.get_submodule(owners[0]).config
        if act is not None and (changes := _config_changes(config, old, act)):
            _change_config(model, config, owners, changes, old, logging.WARNING)


def _swapped(origin: Any, config: Any) -> tuple[set[str], str | None]:
    """The activations that the one has, and the one that the other has in their place; None where they are the same."""
    names = {value: name for name, values in CONFIG_VALUES.items() for value in values}
    both = [[names.get(str(getattr(each, key, ""))) for key in CONFIG_KEYS] for each in (origin, config)]
    changed = [(before, now) for before, now in zip(*both, strict=True) if before and now and before != now]
    return {before for before, _ in changed}, changed[0][1] if changed else None


def _config_changes(config: Any, old: set[str], act: str) -> dict[str, str]:
    values = {value for name in old for value in CONFIG_VALUES[name]}
    changes = {key: CONFIG_VALUES[act][0] for key in CONFIG_KEYS if getattr(config, key, None) in values}
    # T5 derives dense_act_fn from it whenever a config is read.
    t5 = getattr(config, "feed_forward_proj", None)
    if isinstance(t5, str) and "dense_act_fn" in changes:
        value = "gelu_python" if act == "gelu" else changes["dense_act_fn"]  # it reads gated-gelu as tanh
        changes["feed_forward_proj"] = f"gated-{value}" if t5.startswith("gated-") else value
    return changes


def _users(module: nn.Module, name: str, acts: set[str]) -> list[str]:
    return [
        join(name, path, child)
        for path, inner in module.named_modules()
        for child, act in activation_children(inner).items()
        if act in acts
    ]
