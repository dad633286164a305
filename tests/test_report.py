"""The report of runs: one page that needs nothing else, shows their numbers and hides no gap."""

import hashlib
import json
import re
import shutil
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.tokens import visible
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import rewrite, run, small_config
from tests.html_page import CHROMIUM, PROBE, Page, browse, whole

pytest.importorskip("altair", reason="pip install 'opd-stream[report]' brings what draws")

import vl_convert

from pipeline.report.accuracy import COSTS, spent
from pipeline.report.page import page, watch_report, write_report
from pipeline.report.read import read_run, read_runs
from pipeline.report.rounds import cache_exhibit
from pipeline.report.samples import samples
from pipeline.report.steps import mean_of, thinned
from pipeline.report.text import differences

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
    """The run stretched to 200 rounds of 100 steps and 14 ranges of places."""
    place = tmp_path_factory.mktemp("long") / "long"
    shutil.copytree(folder / "first", place)
    report, steps = unsealed_report(place, 0), (place / "metrics.jsonl").read_text().splitlines()
    for epoch in report["epochs"]:
        bin_ = epoch["by_position"][0]
        epoch["by_position"] = [{**bin_, "first": 2**b - 1} for b in range(14)]
    shared = {**json.loads(steps[0]), "epoch": 0}
    lines: list[str] = []
    for index in range(200):
        (place / "rounds" / f"{index:04d}").mkdir(exist_ok=True)
        path = place / "rounds" / f"{index:04d}" / "report.json"
        path.write_text(json.dumps({**report, "round": index, "first_step": 100 * index}))
        for step in range(100 * index, 100 * index + 100):
            lines.append(
                json.dumps({**shared, "round": index, "step": step, "loss": 1 / (1 + step)})
            )
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
    assert set(shown.figures) == {"accuracy", "steps", *(f"run-0-{name}" for name in FIGURES)}
    rows = whole(shown.figures["steps"])["datasets"]
    (steps,) = [each for each in rows.values() if "loss" in each[0]]
    lines = (folder / "first" / "metrics.jsonl").read_text().splitlines()
    assert [row["loss"] for row in steps] == pytest.approx(
        [json.loads(line)["loss"] for line in lines], rel=1e-4
    )
    assert "commit" in shown.text or not (Path(__file__).parent.parent / ".git").exists()
    assert shown.text.index("pass@1 did not change measurably") < shown.text.index("Runs run state")


def test_every_figure_is_drawn_without_a_warning(
    both: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for chart in Page(both).figures.values():
        drawn = vl_convert.vegalite_to_svg(whole(chart))
        assert drawn.count("<path") > 5
    assert capfd.readouterr() == ("", "")


def test_the_page_asks_for_nothing_and_runs_only_its_own_scripts(both: str) -> None:
    shown = Page(both)
    tags, rest = shown.tags, both
    for script in shown.scripts:
        rest = rest.replace(script, "")
    assert "http:" not in rest
    assert "https:" not in rest
    assert "@import" not in rest
    policy = next(a["content"] for _, a in tags if "http-equiv" in a)
    digests = [hashlib.sha256(script.encode()).digest() for script in shown.scripts]
    allowed = " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src " + allowed
    )
    assert not {"iframe", "object", "embed", "img"} & {tag for tag, _ in tags}
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
    shown = Page(alone)
    charts = json.dumps(list(shown.figures.values())) + shown.scripts[-1]
    assert not re.search(r"#[0-9a-f]{6}", charts)  # every colour is a variable of the page
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", charts))
    assert {"--ink", "--grid", "--series-0", "--train"} <= used
    assert all(f"{name}:" in alone for name in used)


def test_what_was_found_in_the_store_costs_nothing_and_is_said(folder: Path, both: str) -> None:
    shown = Page(both)
    assert "It made all its rollouts, scores and policies itself." in shown.text
    assert "It found 4 rollout units, 4 score units, 2 policies" in shown.text
    assert "All settings of the runs are the same." in shown.text
    second = json.dumps(Page(page(read_runs([folder / "second"]))).figures["accuracy"])
    assert "optimizer steps" in second
    assert (
        "FLOPs" not in Page(page(read_runs([folder / "second"]))).figures["accuracy"]["params"][1]
    )


def test_settings_that_differ_are_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "other")
    rewrite(tmp_path / "other" / "config.json", seed=4)
    table = differences(read_runs([folder / "first", tmp_path / "other"]))
    assert table is not None
    assert table.rows == [["seed", "3", "4"]]


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
    assert len(shown.scripts) == 2
    assert not {"img"} & {tag for tag, _ in shown.tags}
    assert name in json.dumps(shown.figures["steps"]).replace("\\\\", "\\")
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
    assert set(FIGURES) <= {name.removeprefix("run-0-") for name in shown.figures}


def test_a_run_that_has_only_begun_is_a_page_of_sentences(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "first" / "config.json", tmp_path)
    shown = Page(page(read_runs([tmp_path])))
    assert "unfinished, 0 of 2 rounds" in shown.text
    assert "No optimizer step has recorded its drift." in shown.text
    assert not shown.figures


def test_a_cost_with_a_gap_is_left_out(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "gap"
    shutil.copytree(folder / "first", place)
    shutil.rmtree(place / "rounds" / "0000")
    assert [spent(read_run(place), cost) for cost in COSTS] == [None] * len(COSTS)


def test_a_mean_over_steps_keeps_the_sum(long: Path) -> None:
    steps = read_run(long).steps
    points, together = thinned(steps)
    assert [step for group in points for step in group] == steps
    assert {len(group) for group in points} == {together}
    means = [mean_of("loss")(group) or 0.0 for group in points]
    assert sum(means) * together == pytest.approx(sum(1 / (1 + place) for place in range(20_000)))


@pytest.mark.parametrize("lost", [(1.1e-4, 1.2e-4), (1e-4, 1e-4), (2e-7, 0.3), (0.0, 3e-5)])
def test_the_lost_mass_has_a_scale(folder: Path, lost: tuple[float, float]) -> None:
    found = read_run(folder / "first")
    for place, value in enumerate(lost):
        mass = {"teacher_top_mass": 1 - value, "student_top_mass": None}
        last = found.rounds[place].epochs[-1].model_copy(update=mass)
        found.rounds[place] = found.rounds[place].model_copy(update={"epochs": (last,)})
    chart = cache_exhibit(found, "cache").chart
    assert chart is not None
    labels = re.findall(r">(\de-\d)<", vl_convert.vegalite_to_svg(whole(chart)))
    assert 2 <= len(labels) == len(set(labels)) <= 12


def test_a_long_run_stays_a_small_page(mixed: str) -> None:
    assert len(mixed.encode()) < 3_000_000
    shown = Page(mixed)
    assert "A point is the mean of up to 50 steps." in shown.text
    assert shown.text.count("A round begins at each vertical line") == 1  # of the short run
    assert "6 of 200 rounds are drawn" in shown.text


def test_sample_texts_are_those_of_the_store_and_lead_to_pages(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken-rollouts").touch()
    with pytest.raises(UserError, match="taken-rollouts is a file; expected a folder"):
        write_report([folder / "first"], tmp_path / "taken.html", rollouts=2)
    write_report([folder / "first"], tmp_path / "report.html", rollouts=2)
    text = (tmp_path / "report.html").read_text()
    found, said = samples(read_run(folder / "first"))
    assert [sample.round_index for sample in found] == [0, 1]
    assert said.startswith("The rounds drew different prompts.")
    for sample in found:
        assert "".join(part for _, part in sample.parts) == visible("".join(sample.view.pieces))
        assert escape(sample.command, quote=False) in text
    links = [str(a["href"]) for tag, a in Page(text).tags if tag == "a" and "rollouts" in str(a)]
    assert links == [f"report-rollouts/0/{index}/index.html" for index in (0, 1)]
    assert all((tmp_path / link).is_file() for link in links)
    assert (tmp_path / "report-rollouts" / "0" / "1" / "0002.html").is_file()


def test_a_watched_run_is_written_until_it_is_finished(folder: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(folder / "first", place)
    (place / "summary.json").rename(tmp_path / "later.json")
    said, pages = list[str](), list[str]()

    def wait(seconds: float) -> None:
        pages.append(out.read_text())
        if len(pages) == 2:
            (tmp_path / "later.json").rename(place / "summary.json")

    watch_report([place], out, say=said.append, wait=wait)
    assert len(pages) == 2
    assert all('<input type="checkbox" checked value="20">' in each for each in pages)
    assert "unfinished" in Page(pages[0]).text
    assert 'checkbox" checked value' not in out.read_text()
    assert "finished, 2 rounds" in Page(out.read_text()).text
    assert ["written again every 20 s" in line for line in said] == [True, False]


def test_without_the_store_a_sentence_stands_for_the_sample_texts(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "first", tmp_path / "run")
    rewrite(tmp_path / "run" / "config.json", store=str(tmp_path / "gone"))
    found, said = samples(read_run(tmp_path / "run"))
    assert found == []
    assert re.match("There are no sample texts: .*gone", said)


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
    assert document.count("<svg") == document.count('class="chart') > 12
    assert console == []
    path.write_text(both.replace("<header>", '<header><img src="http://example.invalid/a">'))
    assert browse(path)[1] != []  # a request would have been told


@NEEDS_CHROMIUM
def test_a_choice_redraws_labels_stay_apart_and_a_phone_need_not_scroll_sideways(
    mixed: str, tmp_path: Path
) -> None:
    start = mixed.index('<meta http-equiv="Content-Security-Policy"')
    text = mixed[:start] + mixed[mixed.index(">", start) + 1 :]  # it would refuse the probe
    before, end, after = text.rpartition("</body>")
    probed = escape(f"{before}<script>{PROBE}</script>{end}{after}")
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
        assert found["before"] == "pass@1 against tokens of all stages"
        assert found["zooms"]
        assert found["after"] == "pass@1 against FLOPs"
        assert found["wide"] <= width
