"""What the pages quote and name is there: messages, files, words."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
QUOTED = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
SOURCES = [
    path for floor in ("opd_stream", "stages", "pipeline") for path in (ROOT / floor).rglob("*.py")
]
HOLE = "…"


@cache
def texts() -> tuple[str, ...]:
    """Every text of the sources; what an f-string fills in is a hole."""
    found: list[str] = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        within = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else HOLE
                    for part in node.values
                )
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and id(node) not in within:
                found.append(str(node.value))
    return tuple(found)


def occurs(quoted: str) -> bool:
    """Whether the pieces between holes stand in one text, in this order."""
    pieces = [piece for piece in quoted.split(HOLE) if piece.strip()]
    pattern = re.compile(".*?".join(re.escape(piece) for piece in pieces), re.DOTALL)
    return sum(map(len, pieces)) >= 12 and any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_stands_in_the_source(quoted: str) -> None:
    assert occurs(quoted)


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert len(QUOTED) > 30
    assert not occurs("train.top_k is … but the moon is …")
    assert not occurs("…")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:opd_stream|stages|pipeline|tests|benchmarks)/\S+\.\w+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name
