"""Build backend: setuptools', plus torch as a requirement of the build only where the target environment has none.

Naming torch in pyproject.toml would make pip download a second torch of several gigabytes beside the installed one.
"""

from find_torch import OLDEST, find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks of PEP 517 and 660


def _torch_if_missing() -> list[str]:
    folder, _ = find_torch()
    return [] if folder else ["torch>=" + ".".join(map(str, OLDEST))]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_missing()
