"""The pages keep their word: links lead somewhere, configs load, README's commands exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from opd_stream.config import Config
from opd_stream.config_file import load_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README = (ROOT / "README.md").read_text()


FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


@cache
def anchors_of(page: Path) -> set[str]:
    """What `PAGE#...` may name: its headings, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each).lower() for each in headings)
    return {re.sub(r"[^\w\- ]", "", each).strip().replace(" ", "-") for each in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file.resolve()), target


NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
REFERENCE = set(re.findall(r"([\w-]+\.md)$", NAV.partition("- Reference:")[2], re.MULTILINE))
TO_READ = [ROOT / "README.md", *(path for path in DOCS.glob("*.md") if path.name not in REFERENCE)]


def words_of(text: str) -> int:
    """Words: what has a letter or a digit."""
    return sum(any(each.isalnum() for each in word) for word in text.split())


def test_the_pages_are_short() -> None:
    assert {"config.md", "results.md"} <= REFERENCE
    assert words_of(README) <= 700
    assert sum(words_of(page.read_text()) for page in TO_READ) <= 15_000


@pytest.mark.parametrize("page", TO_READ, ids=lambda page: page.name)
def test_no_paragraph_is_long(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not part.startswith(("|", "    ")):
            assert words_of(part) <= 90, part


def test_the_site_has_each_page_once() -> None:
    named = re.findall(r"([\w-]+\.md)$", NAV, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_project_loads_and_is_named_in_a_page(path: Path) -> None:
    load_config(path, [])
    assert any(f"configs/{path.name}" in page.read_text() for page in PAGES)


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


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and constants that a file defines."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_what_the_page_on_contributing_names_is_in_the_files_it_names() -> None:
    """Of "`FILE`: `NAME`", and of further names in the same cell."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    cells = re.findall(r"`([\w/]+\.py)`: (`[^|\n]+)", page)
    assert len(cells) > 20
    for file, text in cells:
        for name in re.findall(r"`(\w+)`", text):
            assert name in names_in(ROOT / file), (file, name)


def test_folders_named_on_the_page_on_contributing_exist() -> None:
    for name in re.findall(r"`([\w/]+/)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).is_dir(), name
