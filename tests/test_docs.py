"""The pages of docs: every block runs, every link leads somewhere, the picture is what its script draws."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sadmoe
from sadmoe.cli import _parser

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sadmoe.hf.experts import OLDEST
from versions import transformers_before

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "bench/results").glob("*.md"))]
NEEDS = {"evaluate-with-lm-eval": "lm_eval"}  # what a page is about


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    if page.stem == "convert-your-model" and transformers_before(OLDEST):
        pytest.skip(f"its last part is of transformers {OLDEST}")
    scripts = Path(sys.executable).parent  # sadmoe, torchrun, accelerate
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "tests/run_blocks.py"), "--bash", str(page)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", page.read_text())
    assert [link for link, _ in links if not (page.parent / link).exists()] == []
    anchored = [(page.parent / link if link else page, anchor) for link, anchor in links if anchor]
    assert [(to.name, anchor) for to, anchor in anchored if anchor not in anchors(to)] == []


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if f"docs/{page.name}" not in readme] == []


def summary(*options: str) -> str:
    command = [sys.executable, str(ROOT / "bench/recipes/summary.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_tables_of_all_runs_are_what_their_command_prints():
    table = summary("--short").strip()
    assert table.startswith("run ")
    assert f"```\n{table}\n```" in (ROOT / "bench/results/tasks.md").read_text()
    assert summary() == (ROOT / "bench/results/every-setting.txt").read_text()


def test_the_demo_of_the_readme_is_one_that_was_kept():
    shown = (ROOT / "README.md").read_text().partition("## What the demo shows")[2].split("```")[1]
    kept = (ROOT / "bench/results/demo-zen5.txt").read_text()
    assert [part for part in shown.strip("\n").split("\n\n") if part not in kept] == []


def test_every_option_is_on_the_page_of_the_command_line():
    page = (ROOT / "docs/command-line.md").read_text()
    (commands,) = (a.choices for a in _parser()._actions if isinstance(a.choices, dict))
    options = {flag for c in commands.values() for action in c._actions for flag in action.option_strings}
    assert len(options) > 20
    assert [flag for flag in sorted(options - {"-h", "--help"}) if f"`{flag}`" not in page] == []
    assert [name for name in commands if f"`sadmoe {name}" not in page] == []


def test_the_table_of_the_gpu_model_is_what_its_code_prints(capsys):
    page = (ROOT / "docs/speed.md").read_text().partition("## On a GPU, by a model")[2]
    code, table = re.findall(r"```(?:python)?\n(.*?)```", page, re.DOTALL)[:2]
    exec(code, {})
    assert capsys.readouterr().out == table


def test_every_public_name_is_told():
    page = (ROOT / "docs/api.md").read_text()
    assert [name for name in sadmoe.__all__ if f"`{name}`" not in page] == []
    told = set(re.findall(r"`(\w+)`", page.partition("**In transformers**")[0]))
    foreign = {"_", "with", "save_pretrained", "from_pretrained"}
    assert [name for name in told - foreign if not hasattr(sadmoe, name)] == []


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs/picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/how-it-works.svg").read_text() == module.picture()
