"""The pages keep their word: links lead somewhere, configs load, README's commands exist."""

import re
from pathlib import Path

import pytest
import yaml

from opd_stream.config import Config
from opd_stream.config_file import load_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_project_loads_and_is_named_in_the_readme(path: Path) -> None:
    load_config(path, [])
    assert f"configs/{path.name}" in README


def test_the_index_of_the_pages_names_each_once() -> None:
    named = re.findall(r"^- \[[\w-]+\]\(([\w-]+\.md)\): ", (DOCS / "README.md").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md") if path.stem != "README")


def test_the_config_in_the_readme_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert Config.model_validate(yaml.safe_load(block)).rounds == 20


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(), re.M)) <= targets


def test_every_file_in_the_readmes_tree_exists() -> None:
    names = set(re.findall(r"^ {6}([a-z_]+(?:\.py|/)) ", README, re.MULTILINE))
    assert len(names) > 10
    for name in names:
        assert any(ROOT.glob(f"[ops]*/{name}")), name
