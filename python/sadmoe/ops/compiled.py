"""The compiled library, loaded: OPS are its ops."""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.with_name("_ops.so")


def _load() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"sadmoe's compiled ops are missing ({_LIBRARY}). Build them with `pip install .` in the source tree, and "
            "import sadmoe from outside it; or `pip install -e .` to work inside it."
        )
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        raise ImportError(
            f"sadmoe needs torch >= 2.10, found {torch.__version__}: pip install --upgrade torch"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"sadmoe's compiled ops do not load beside torch {torch.__version__}: {error}. Reinstall sadmoe in this "
            "environment with `pip install --force-reinstall --no-deps .`"
        ) from error


_load()
OPS = torch.ops.sadmoe
