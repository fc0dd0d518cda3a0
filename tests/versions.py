"""What depends on which transformers is here; `.ci/run` also tests with the oldest that pyproject.toml admits."""

from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion


def transformers_before(release: str) -> bool:
    """Whether it is older; not where there is none."""
    try:
        return TorchVersion(version("transformers")) < release
    except PackageNotFoundError:
        return False
