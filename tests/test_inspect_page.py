"""The page and the terminal: what they say is what the cache says, and nothing in it is obeyed."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opd_stream.config import Config
from opd_stream.tokens import TokenText, quoted, visible
from pipeline.inspect.command import inspect_rollout, inspect_worst
from pipeline.inspect.page import index_page, page, write_pages
from pipeline.inspect.view import RolloutView, mean_of
from pipeline.run_folder import RunFolder
from tests.conftest import Command, SmallRuns, small_config
from tests.html_page import CHROMIUM, browse
from tests.test_inspect import printed, rows_of

NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
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


def probed(text: str, script: str, folder: Path, *options: str) -> dict[str, str | None]:
    """The attributes of a page's body after a script that its policy would refuse."""
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:start] + text[text.index(">", start) + 1 :]
    before, end, after = text.rpartition("</body>")
    path = folder / "probed.html"
    path.write_text(f"{before}<script>{script}</script>{end}{after}")
    document, console = browse(path, *options)
    assert console == []
    return next(attributes for tag, attributes in Page(document).tags if tag == "body")


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
        (attributes["href"] or "").startswith("#") for tag, attributes in read.tags if tag == "a"
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


def test_the_worst_rollouts_become_a_folder_to_browse(
    finished: tuple[RunFolder, Config], tmp_path: Path, opd_stream: Command
) -> None:
    directory, config = finished
    found = inspect_worst(directory, config, round_index=0, count=3, by="entropy")
    words = ["inspect", str(directory.path), "--round", "0", "--worst", "3", "--by", "entropy"]
    out = tmp_path / "rollouts"
    code, output, _ = opd_stream(*words, "--html", str(out))
    assert (code, output) == (0, f"{out}/index.html: 3 rollouts; open it in a browser\n")
    index = Page((out / "index.html").read_text())
    rows = [attributes for tag, attributes in index.tags if tag == "tr" and attributes]
    means = [json.loads(str(row["data-means"])) for row in rows]
    assert [mean["entropy"] for mean in means] == pytest.approx(
        [entry.view.mean for entry in found], abs=1e-6
    )
    links = [str(attributes["href"]) for tag, attributes in index.tags if tag == "a"]
    assert links == ["#rollouts", "0001.html", "0002.html", "0003.html"]
    shown = Page((out / "0002.html").read_text())
    around = [a["href"] for tag, a in shown.tags if tag == "a" and "rel" in a]
    assert around == ["0001.html", "0003.html"]
    assert found[1].view.row.prompt_id in "".join(shown.text)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert opd_stream(*words, "--html", str(out))[0] == 0  # its own index it writes again
    (out / "index.html").write_text("<h1>My own</h1>")
    code, _, error = opd_stream(*words, "--html", str(out))
    assert code == 2
    assert "is no index of rollouts" in error


def test_the_index_escapes_what_it_lists(finished: tuple[RunFolder, Config]) -> None:
    text = index_page([hostile(finished)], ["0001.html"], [HOSTILE])
    shown = Page(text)
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert not {"img", "iframe"} & {tag for tag, _ in shown.tags}


@NEEDS_CHROMIUM
def test_the_index_filters_and_a_card_stays_inside_the_window(
    finished: tuple[RunFolder, Config], tmp_path: Path
) -> None:
    directory, config = finished
    views = [w.view for w in inspect_worst(directory, config, round_index=0, count=3)]
    write_pages(views, [], tmp_path / "pages")
    probe = """
    form.elements.figure.value = 'teacher_nll';
    form.elements.least.value = LEAST;
    form.dispatchEvent(new Event('input'));
    document.body.dataset.found = [...body.querySelectorAll('a')].map(a => a.textContent);
    """
    nll = sorted((mean_of(v.figures["teacher_nll"], v.trains), v.row.prompt_id) for v in views)
    text = (tmp_path / "pages" / "index.html").read_text()
    body = probed(text, probe.replace("LEAST", str(nll[1][0] - 1e-5)), tmp_path)
    assert body["data-found"] == f"{nll[2][1]},{nll[1][1]}"
    card = """
    (async () => {
      const frame = () => new Promise(done => setTimeout(done, 40));
      const outside = [];
      for (const token of document.querySelectorAll('.t')) {
        token.focus();
        await frame();
        const box = token.querySelector('.tip').getBoundingClientRect();
        if (!box.width || box.left < 0 || box.top < 0 || box.right > innerWidth ||
            box.bottom > innerHeight) outside.push(token.id);
      }
      document.body.dataset.outside = outside.join(' ');
    })();
    """
    text = (tmp_path / "pages" / "0001.html").read_text()
    assert probed(text, card, tmp_path, "--window-size=400,700")["data-outside"] == ""


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
