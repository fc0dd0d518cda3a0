"""What every test of the command line has: a small model in a folder, a text, routers that are trained quickly."""

from dataclasses import dataclass

import pytest
from sadmoe.cli import convert as convert_command
from sadmoe.routers import RouterConfig


@dataclass(frozen=True)
class Quick(RouterConfig):
    steps: int = 20


@pytest.fixture(autouse=True, scope="module")
def quick_routers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_command, "RouterConfig", Quick)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from command_line import bert  # which skips without transformers

    return bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("experts run\n\nfew tokens choose\nthem\n\n" + "tokens choose few experts\n\n" * 20)
    return path
