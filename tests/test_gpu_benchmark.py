"""The benchmark that waits for a GPU works, at shapes that a CPU has in a second."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--lines", str(tmp_path / "lines"), "--page", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_figure_is_a_line_and_a_row_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    lines, page = tmp_path / "lines", tmp_path / "page.md"
    words = ["--device", "cpu", "--tiny", "--lines", str(lines), "--page", str(page)]
    assert gpu.main(words) == 0
    said = capsys.readouterr().out
    assert said == lines.read_text()
    assert "refused" not in said
    names = ("loss, fused", "loss, dense", "scoring", "sampling", "one row", "full", "LoRA")
    rows = [row for row in page.read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) == said.count("\n")
    assert all(any(name in row for row in rows) for name in names)


def test_what_does_not_fit_is_a_row(tmp_path: Path) -> None:
    def make() -> None:
        raise torch.OutOfMemoryError("no 34 GiB | left")

    found = gpu._figures(make, 1, torch.device("cpu"))  # type: ignore[arg-type]
    line = {"device": "d", "torch": "2", "date": "today", "what": "loss", **found}
    assert "OutOfMemoryError: no 34 GiB / left" in gpu.page([line])
