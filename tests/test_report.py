"""The report of runs: one page that needs nothing else, shows their numbers and hides no gap."""

import json
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import pytest

from opd_stream.errors import UserError
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import rewrite, run, small_config
from tests.html_page import CHROMIUM, PROBE, Page, browse

pytest.importorskip("matplotlib", reason="pip install 'opd-stream[report]' brings what draws")

from pipeline.report.accuracy import COSTS, spent
from pipeline.report.drift import thinned
from pipeline.report.page import page, write_report
from pipeline.report.read import read_run, read_runs
from pipeline.report.rounds import cache_exhibit

WINDOW = (
    "rollouts.window={kind: adaptive, candidates: [12, 24], max_window_tokens: 48, start: 24, "
    "probe_rows: 4, probe_share: 0.5}"
)
FIGURES = ("window", "drift", "position", "cache", "stages", "lineage")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the adaptive window with gates, and the same once more from its store."""
    place = tmp_path_factory.mktemp("report")
    config = small_config(place, WINDOW, "train.gate={blocks: 8}", "evaluation.every_rounds=1")
    for name in ("first", "second"):
        run(config, RunFolder(place / name), Silent())
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> str:
    """The page of one run."""
    return page(read_runs([folder / "first"]))


@pytest.fixture(scope="module")
def both(folder: Path) -> str:
    """The page of two."""
    return page(read_runs([folder / "first", folder / "second"]))


@pytest.fixture(scope="module")
def long(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run stretched to 90 rounds of 40 steps and 14 ranges of places."""
    place = tmp_path_factory.mktemp("long") / "long"
    shutil.copytree(folder / "first", place)
    report, steps = unsealed_report(place, 0), (place / "metrics.jsonl").read_text().splitlines()
    for epoch in report["epochs"]:
        bin_ = epoch["by_position"][0]
        epoch["by_position"] = [{**bin_, "first": 2**b - 1} for b in range(14)]
    lines: list[str] = []
    for index in range(90):
        (place / "rounds" / f"{index:04d}").mkdir(exist_ok=True)
        path = place / "rounds" / f"{index:04d}" / "report.json"
        path.write_text(json.dumps({**report, "round": index}))
        for step in range(40 * index, 40 * index + 40):
            line = json.loads(steps[step % len(steps)])
            lines.append(json.dumps({**line, "round": index, "epoch": 0, "step": step}))
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def mixed(folder: Path, long: Path) -> str:
    """The page of a short run and the long one."""
    return page(read_runs([folder / "first", long]))


def unsealed_report(folder: Path, index: int) -> dict[str, Any]:
    """A report as versions wrote it whose records had no digest."""
    report = report_of(folder, index)
    return {name: value for name, value in report.items() if name not in ("record", "digest")}


def report_of(folder: Path, index: int) -> dict[str, Any]:
    return json.loads((folder / "rounds" / f"{index:04d}" / "report.json").read_text())


def test_a_finished_run_is_shown_whole(folder: Path, alone: str) -> None:
    shown = Page(alone)
    summary = json.loads((folder / "first" / "summary.json").read_text())
    assert "finished, 2 rounds" in shown.text
    for value in summary["tokens"].values():
        assert f"{value:,}" in shown.text
    for evaluation in summary["evaluations"]:
        assert f"{evaluation['pass@1']:.3f}" in shown.text
    for index in (0, 1):
        report = report_of(folder / "first", index)
        for epoch in report["epochs"]:
            assert epoch["reason"] in shown.text
            assert f"{epoch['reverse_kl']:.4f}" in shown.text
        assert f"scores/{report['caches'][0]['scores'][:16]}" in shown.text
        assert f"policies/{report['policy']['fingerprint'][:16]}" in shown.text
    decision = report_of(folder / "first", 0)["window_decision"]
    assert decision["reason"] in shown.text
    assert all(f"{cosine:.3f}" in shown.text for cosine in decision["cosines"])
    assert [name for name in FIGURES if not shown.figure(f"run-0-{name}")] == []
    for cost in ("tokens", "teacher", "flops", "seconds"):
        assert shown.figure(f"accuracy-{cost}")
        assert ("label", {"for": f"cost-{cost}"}) in shown.tags


def test_the_page_asks_for_nothing_and_runs_nothing(both: str) -> None:
    assert "http:" not in both
    assert "https:" not in both
    assert "@import" not in both
    tags = Page(both).tags
    assert not {"script", "iframe", "object", "embed", "img"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:,"))
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    targets = {str(a["href"])[1:] for _, a in tags if str(a.get("href", "")).startswith("#")}
    assert len(set(names)) == len(names)
    assert targets <= set(names)


def test_colours_follow_the_reader(alone: str) -> None:
    assert "prefers-color-scheme: dark" in alone
    styles = [str(attributes.get("style", "")) for _, attributes in Page(alone).tags]
    drawn = [style for style in styles if "fill:" in style or "stroke:" in style]
    assert len(drawn) > 500
    assert all("#" not in style for style in drawn)  # every colour is a variable of the page
    used = {name for style in styles for name in re.findall(r"var\((--[a-z0-9-]+)\)", style)}
    assert {"--ink", "--grid", "--series-0", "--train"} <= used
    assert all(f"{name}:" in alone for name in used)


def test_what_was_found_in_the_store_costs_nothing_and_is_said(folder: Path, both: str) -> None:
    shown = Page(both)
    assert "It made all its rollouts, scores and policies itself." in shown.text
    assert "It found 4 rollout units, 4 score units, 2 policies" in shown.text
    assert shown.figure("run-1-lineage")
    second = Page(page(read_runs([folder / "second"])))
    assert "no finished round has spent anything" in second.text


def test_text_of_a_run_is_escaped(folder: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>$\\frac{"
    shutil.copytree(folder / "first", tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    config["student"]["path"] = "</pre><script>alert(2)</script>"
    rewrite(tmp_path / name / "config.json", **config)
    report = report_of(tmp_path / name, 0)
    report["epochs"][0]["reason"] = "<script>alert(3)</script>"
    rewrite(tmp_path / name / "rounds" / "0000" / "report.json", **report)
    shown = Page(page(read_runs([tmp_path / name])))
    assert not {"img", "script"} & {tag for tag, _ in shown.tags}
    for text in (name, config["student"]["path"], report["epochs"][0]["reason"]):
        assert text in shown.text


def test_an_unfinished_run_is_shown_as_far_as_it_is(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "half"
    shutil.copytree(folder / "first", place)
    (place / "rounds" / "0001" / "report.json").unlink()
    (place / "summary.json").unlink()
    metrics = (place / "metrics.jsonl").read_text()
    (place / "metrics.jsonl").write_text(metrics[:-20])
    found = read_run(place)
    assert len(found.steps) == len(metrics.splitlines()) - 1
    shown = Page(page([found]))
    assert "unfinished, 1 of 2 rounds; round 1 is planned and not finished" in shown.text
    assert "No curve is drawn: no policy has been evaluated." in shown.text
    assert "Planned, not finished." in shown.text
    assert [name for name in FIGURES if not shown.figure(f"run-0-{name}")] == []


def test_a_run_that_has_only_begun_is_a_page_of_sentences(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "first" / "config.json", tmp_path)
    shown = Page(page(read_runs([tmp_path])))
    assert "unfinished, 0 of 2 rounds" in shown.text
    assert "No optimizer step has recorded its drift." in shown.text
    assert not any(shown.figure(f"run-0-{name}") for name in FIGURES)


def test_a_cost_with_a_gap_is_left_out(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "gap"
    shutil.copytree(folder / "first", place)
    shutil.rmtree(place / "rounds" / "0000")
    assert [spent(read_run(place), cost) for cost in COSTS] == [None] * len(COSTS)


def test_a_mean_over_steps_keeps_the_sum(long: Path) -> None:
    steps = read_run(long).steps
    points, together = thinned(steps)
    assert len(points) * together == len(steps)
    drift = [step.policy_drift or 0.0 for step in steps]
    assert sum(p.policy_drift or 0.0 for p in points) * together == pytest.approx(sum(drift))


@pytest.mark.parametrize("lost", [(1.1e-4, 1.2e-4), (1e-4, 1e-4), (2e-7, 0.3), (0.0, 3e-5)])
def test_the_lost_mass_has_a_scale(folder: Path, lost: tuple[float, float]) -> None:
    found = read_run(folder / "first")
    for place, value in enumerate(lost):
        mass = {"teacher_top_mass": 1 - value, "student_top_mass": None}
        last = found.rounds[place].epochs[-1].model_copy(update=mass)
        found.rounds[place] = found.rounds[place].model_copy(update={"epochs": (last,)})
    labels = re.findall(r">(1e−\d\d)<", cache_exhibit(found, "cache").svg or "")
    assert 2 <= len(labels) == len(set(labels)) <= 6


def test_a_long_run_stays_a_small_page(mixed: str) -> None:
    assert len(mixed) < 1_000_000
    shown = Page(mixed)
    assert "A point is the mean of up to 5 steps." in shown.text
    lines = shown.text.count("A round begins at each vertical line")
    assert lines == 2  # read and heard, of the short run
    assert "6 of 90 rounds are drawn" in shown.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json; expected the folder of a run"),
        ("summary.json", "{", "is not valid JSON"),
        ("summary.json", "[]", "is damaged: it holds a list, no object"),
        ("summary.json", '{"evaluations": 3}', "finished: Field required"),
        ("metrics.jsonl", "{}\n", "line 1 of .*round: Field required"),
    ],
)
def test_a_folder_that_cannot_be_shown_is_refused(
    folder: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    place = tmp_path / "run"
    shutil.copytree(folder / "first", place)
    (place / file).unlink()
    if content is not None:
        (place / file).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([place], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / "first", tmp_path / name / "run")
    names = [found.name for found in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == [str(tmp_path / name / "run") for name in ("a", "b")]


def test_the_same_runs_make_the_same_page(folder: Path, tmp_path: Path, alone: str) -> None:
    line = write_report([folder / "first"], tmp_path / "report.html")
    assert "report.html: 1 run, " in line
    assert (tmp_path / "report.html").read_text() == alone


NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@NEEDS_CHROMIUM
def test_a_browser_loads_the_page_without_a_word(both: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(both)
    document, console = browse(path)
    assert "</html>" in document
    assert console == []
    path.write_text(both.replace("<main>", '<main><img src="http://example.invalid/a">'))
    assert browse(path)[1] != []  # a request would have been told


@NEEDS_CHROMIUM
def test_the_switch_switches_labels_stay_apart_and_a_phone_need_not_scroll_sideways(
    mixed: str, tmp_path: Path
) -> None:
    start = mixed.index('<meta http-equiv="Content-Security-Policy"')
    text = mixed[:start] + mixed[mixed.index(">", start) + 1 :]  # it would refuse the probe
    probed = escape(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    frames = [
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{probed}"></iframe>'
        for width in (360, 1280)
    ]
    path = tmp_path / "frames.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{''.join(frames)}</body>")
    document, _ = browse(path, "--window-size=1400,1000")
    body = next(attributes for tag, attributes in Page(document).tags if tag == "body")
    for width in (360, 1280):
        found = json.loads(str(body[f"data-at-{width}"]))
        assert found["overlaps"] == []
        assert found["cut"] == []
        assert found["before"] == ["pane pane-tokens"]
        assert found["after"] == ["pane pane-flops"]
        assert found["wide"] <= width
