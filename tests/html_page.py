"""What the tests of pages share: elements of a page, and a browser where there is one."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "input", "br", "img", "hr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(HTMLParser):
    """Elements of a page, its text, and whether every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}  # id -> the chart that is drawn
        self.scripts: list[str] = []  # that run
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1]:
                figure = next(a for tag, a in reversed(self.tags) if tag == "figure")
                self.figures[str(figure["id"])] = json.loads(data)
            else:
                self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(self.words).split())


def whole(chart: dict[str, Any]) -> dict[str, Any]:
    """A chart of a page as Vega-Lite has it, with rows that have their columns' names."""
    datasets = {
        name: [dict(zip(data["names"], row, strict=True)) for row in data["rows"]]
        for name, data in chart["datasets"].items()
    }
    return {**chart, "datasets": datasets}


def browse(path: Path, *options: str) -> tuple[str, list[str]]:
    """The document as Chromium has it after loading, and what its console says."""
    assert CHROMIUM is not None
    profile = path.parent / "profile"
    found = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            "--virtual-time-budget=30000",
            *options,
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout, [line for line in found.stderr.splitlines() if ":CONSOLE" in line]


# Written into a page in a frame, once it is drawn: what is cut or overlaps, what a choice does.
PROBE = """
const drawn = text => text.getClientRects().length && getComputedStyle(text).opacity > 0;
const crossed = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
const charts = [...document.querySelectorAll('.chart')];
async function probe() {
  while (!charts.every(chart => chart.querySelector('svg[role=img]'))) {
    await new Promise(done => setTimeout(done, 50));
  }
  const overlaps = [], cut = [];
  for (const chart of charts) {
    const svg = chart.querySelector('svg');
    const texts = [...svg.querySelectorAll('text')].filter(drawn);
    const boxes = texts.map(text => text.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
      if (crossed(a, b)) overlaps.push(texts[i].textContent + ' / ' + texts[i + 1 + j].textContent);
    }));
    const width = svg.getBoundingClientRect().width;
    if (width < svg.width.baseVal.value - 1) cut.push(chart.dataset.label);
  }
  const accuracy = document.querySelector('#accuracy .chart');
  const title = () => accuracy.querySelector('.role-title text').textContent;
  const before = title(), cost = accuracy.querySelectorAll('select')[1];
  cost.value = 'FLOPs';
  cost.dispatchEvent(new Event('change', {bubbles: true}));
  await new Promise(done => setTimeout(done, 300));
  const line = document.querySelector('#steps .mark-line path');
  const {x, y} = line.getBoundingClientRect();
  const start = line.getAttribute('d');
  const wheel = {deltaY: -300, ctrlKey: true, bubbles: true, clientX: x + 50, clientY: y + 9};
  line.dispatchEvent(new WheelEvent('wheel', wheel));
  await new Promise(done => setTimeout(done, 300));
  const zooms = document.querySelector('#steps .mark-line path').getAttribute('d') !== start;
  const wide = document.documentElement.scrollWidth;
  const found = {overlaps, cut, zooms, before, after: title(), wide};
  parent.document.body.setAttribute('data-at-' + innerWidth, JSON.stringify(found));
}
probe();
"""
