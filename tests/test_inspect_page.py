"""The page and the terminal: what they say is what the cache says, and nothing in it is obeyed."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opd_stream.config import Config
from opd_stream.tokens import TokenText, quoted, visible
from pipeline.inspect.command import inspect_rollout, inspect_worst
from pipeline.inspect.page import page
from pipeline.inspect.view import RolloutView
from pipeline.run_folder import RunFolder
from tests.conftest import Command, SmallRuns, small_config
from tests.test_inspect import printed, rows_of

HOSTILE = '<script>alert("x")</script>\x1b[31m'


@pytest.fixture(scope="module")
def finished(small_runs: SmallRuns) -> tuple[RunFolder, Config]:
    settings = ("rounds=1", "evaluation=null")
    folder = small_runs(*settings)
    return RunFolder(folder / "run"), small_config(folder, *settings)


class Hostile:
    """Every token is markup and a control sequence."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return HOSTILE * len(ids)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def hostile(finished: tuple[RunFolder, Config]) -> RolloutView:
    directory, config = finished
    prompt_id = rows_of(directory, config)[0].prompt_id
    view = inspect_rollout(directory, config, round_index=0, prompt_id=prompt_id)
    located = replace(view.located, row=replace(view.row, prompt_id=f'"><img src=x>{HOSTILE}'))
    return replace(view.reader, text=TokenText(Hostile())).view(located, "reverse_kl")


def test_the_page_escapes_everything(finished: tuple[RunFolder, Config]) -> None:
    view = hostile(finished)
    text = page(view)
    read = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert "<script" not in text
    assert "\x1b" not in text
    shown = visible(HOSTILE)
    assert sum(data.startswith(shown) for data in read.text) >= len(view.pieces)
    names = {name for _, attributes in read.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not {"src", "srcset", "action"} & names
    assert all(
        (attributes["href"] or "").startswith("#t") for tag, attributes in read.tags if tag == "a"
    )
    policy = next(a["content"] for _, a in read.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_terminal_gets_no_control_sequence_from_a_rollout(
    finished: tuple[RunFolder, Config],
) -> None:
    text = printed(hostile(finished))
    assert "\x1b" not in text
    assert "\\x1b[31m" in text


def test_the_page_says_of_every_token_what_the_cache_says(
    finished: tuple[RunFolder, Config], tmp_path: Path, opd_stream: Command
) -> None:
    directory, config = finished
    view = inspect_worst(directory, config, round_index=0, count=1)[0].view
    out = tmp_path / "rollout.html"
    words = ["inspect", str(directory.path), "--round", "0", "--prompt", view.row.prompt_id]
    code, output, _ = opd_stream(*words, "--html", str(out))
    assert code == 0
    assert str(out) in output
    read = Page(out.read_text())
    tokens = [attributes for _, attributes in read.tags if attributes.get("tabindex") == "0"]
    tips = {attributes["id"] for _, attributes in read.tags if attributes.get("role") == "tooltip"}
    assert [token["id"] for token in tokens] == [f"t{n}" for n in range(len(view.pieces))]
    assert {token["aria-describedby"] for token in tokens} == tips
    place = view.worst(1)[0]
    assert (tokens[place]["class"] or "").split() == ["t", "w5"]
    start = read.text.index(f"token {place}, id {view.row.completion_ids[place]}")
    said = [data.strip() for data in read.text[start : start + 60]]
    assert said[said.index("reverse_kl") + 1] == f"{view.values[place]:.4g}"
    assert said[said.index("rank") + 1] == view.ranks[place]
    first = view.candidates(place, 1)[0]
    assert said[said.index(quoted(first.text)) + 1] == f"{first.probability:.4f}"


def test_a_narrow_terminal_still_reads_the_candidates(
    finished: tuple[RunFolder, Config],
) -> None:
    directory, config = finished
    view = inspect_worst(directory, config, round_index=0, count=1)[0].view
    (first,) = view.candidates(view.worst(1)[0], 1)
    for width in (80, 140):
        lines = printed(view, width=width).splitlines()
        table = lines[lines.index(f"tokens with the largest {view.figure.name}".ljust(width)) :]
        assert any(f"{quoted(first.text)} {first.probability:.4f}" in line for line in table)
        assert any("retained" in line for line in table) == (width == 140)
