"""Which torch to build against: the one pip is installing beside, else the one the build environment imports."""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 10)  # the first with every stable-ABI call that is used


def _version(folder: Path) -> str | None:
    """Read, not imported: importing torch takes a second and may need libraries that a build machine lacks."""
    try:
        found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _candidates() -> Iterator[Path]:
    if os.environ.get("SADMOE_TORCH_DIR"):  # a choice, not a hint: no other is taken in its place
        yield Path(os.environ["SADMOE_TORCH_DIR"])
        return
    for key in ("platlib", "purelib"):  # in pip's isolated build these are still the target environment's
        yield Path(sysconfig.get_path(key)) / "torch"
    if _sees_system_packages():  # which the isolated build does not
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        # The last two are Debian's.
        schemes = {sysconfig.get_default_scheme(), "posix_prefix", "posix_local", "deb_system"}
        for scheme in sorted(schemes & set(sysconfig.get_scheme_names())):
            for key in ("platlib", "purelib"):
                yield Path(sysconfig.get_path(key, scheme, vars=base)) / "torch"
    if sys.prefix == sys.base_prefix:
        yield Path(site.getusersitepackages()) / "torch"
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent


def _sees_system_packages() -> bool:
    """Whether this is a virtual environment that was made with --system-site-packages."""
    try:
        said = (Path(sys.prefix) / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"(?mi)^include-system-site-packages\s*=\s*true", said) is not None


def find_torch() -> tuple[Path | None, list[str]]:
    """The folder of a fitting torch or None, and what was seen and did not fit."""
    unfit: list[str] = []
    for folder in _candidates():
        version = _version(folder)
        numbers = re.match(r"(\d+)\.(\d+)", version or "")
        if version is None or numbers is None:
            if os.environ.get("SADMOE_TORCH_DIR"):
                unfit.append(f"no torch in SADMOE_TORCH_DIR={folder}")
            continue
        if (int(numbers[1]), int(numbers[2])) >= OLDEST and (
            folder / "include/torch/csrc/stable/library.h"
        ).exists():
            return folder, unfit
        unfit.append(f"{version} in {folder}")
    return None, unfit


def required_torch() -> Path:
    """The folder of a fitting torch; ends the program with what to do where there is none."""
    folder, unfit = find_torch()
    if folder is None:
        oldest = ".".join(map(str, OLDEST))
        sys.exit(
            f"sadmoe: building needs PyTorch >= {oldest}; found {'; '.join(unfit) or 'none'}. "
            f"Install one first (pip install 'torch>={oldest}'), or let pip build in isolation."
        )
    return folder
