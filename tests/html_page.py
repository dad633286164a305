"""What the tests of pages share: elements of a page, and a browser where there is one."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "input", "br", "img", "hr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(HTMLParser):
    """Elements of a page, its text, and whether every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
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
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def figure(self, name: str) -> bool:
        """Whether the page has the drawing of this name."""
        return any(
            tag == "svg" and str(attributes.get("aria-labelledby")).startswith(f"{name}-")
            for tag, attributes in self.tags
        )


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
            "--virtual-time-budget=2000",
            *options,
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout, [line for line in found.stderr.splitlines() if ":CONSOLE" in line]


# Written into a page in a frame: what is drawn, what overlaps, what the switch does.
PROBE = """
const drawn = element => element.getClientRects().length > 0;
const panes = () => [...document.querySelectorAll('.pane')].filter(drawn).map(p => p.className);
const crossed = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
const overlaps = [];
for (const svg of document.querySelectorAll('.drawing svg')) {
  const texts = [...svg.querySelectorAll('text')].filter(drawn);
  const boxes = texts.map(text => text.getBoundingClientRect());
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
    if (crossed(a, b)) overlaps.push(texts[i].textContent + ' / ' + texts[i + 1 + j].textContent);
  }));
}
const cut = [...document.querySelectorAll('.drawing')].filter(drawn)
  .filter(box => box.scrollWidth > box.clientWidth).map(box => box.getAttribute('aria-label'));
const found = {overlaps, cut, before: panes(), wide: document.documentElement.scrollWidth};
document.getElementById('cost-flops').focus();
document.activeElement.click();
found.after = panes();
parent.document.body.setAttribute('data-at-' + innerWidth, JSON.stringify(found));
"""
