"""Runs from Python: `import opd_stream as opd`."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import opd_stream as opd
from opd_stream.config import Config
from pipeline.cli import main
from tests.conftest import MODELS, SMALL_RUN
from tests.page_blocks import blocks_of

ROOT = Path(__file__).parent.parent


def test_a_finished_run_is_read_as_tables(finished_run: Path) -> None:
    run = opd.open_run(finished_run / "run")
    summary = run.summary
    assert run.is_finished
    assert summary is not None
    assert len(run.metrics) == summary.steps
    assert run.metrics["step"].is_monotonic_increasing
    assert list(run.rounds.index) == [0, 1]
    assert run.rounds["tokens.teacher_scored"].sum() == summary.tokens.teacher_scored
    figures = run.evaluations.set_index(["policy_version", "figure"])
    assert figures.loc[(2, "pass@1"), "value"] == summary.evaluations[-1].passes["pass@1"]
    assert (figures["low"] <= figures["value"]).all()
    assert f"{summary.rounds} of {summary.rounds_planned} rounds, finished" in repr(run)
    assert "<table" in run._repr_html_()


def test_rollouts_have_texts_and_a_log_probability_a_token(finished_run: Path) -> None:
    run = opd.open_run(finished_run / "run")
    found = run.rollouts(1)
    row = found.iloc[0]
    assert len(found) == len(found.drop_duplicates(["prompt_id", "sample_index"]))
    assert row.tokens == len(row.teacher_logprobs) == len(row.behavior_logprobs)
    assert np.all(row.teacher_logprobs <= 0)
    assert found["trained_tokens"].sum() == run.rounds.loc[1, "tokens.trained"] / 2  # two epochs
    ids = run.tokenizer()(row.completion, add_special_tokens=False)["input_ids"]
    assert len(ids) in (row.tokens, row.tokens - 1)  # without its terminator
    assert set(found["is_right"]) <= {True, False}


def test_policies_are_models_whose_weights_differ(finished_run: Path) -> None:
    run = opd.open_run(finished_run / "run")
    before, after = (run.policy(version).get_input_embeddings().weight for version in (0, None))
    assert before.shape == after.shape
    assert not before.equal(after)
    with pytest.raises(opd.UserError, match="no trained policy of version 9; expected one of 1"):
        run.policy(9)


def test_report_is_written_beside_the_run_or_where_asked(
    finished_run: Path, tmp_path: Path
) -> None:
    place = opd.open_run(finished_run / "run").report(tmp_path / "page.html")
    assert place.read_text().startswith("<!DOCTYPE html>")


def test_run_takes_fields_a_file_or_a_config_and_resumes(tmp_path: Path) -> None:
    fields = {**SMALL_RUN, "evaluation": None, "store": str(tmp_path / "store")}
    first = opd.run(fields, {"rounds": 1, "held_out_prompts": 0}, run_dir=tmp_path / "run")
    assert first.is_finished
    assert first.config.rounds == 1
    again = opd.run(first.config, run_dir=tmp_path / "run")
    assert again.summary == first.summary
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(first.config.model_dump(mode="json")))
    more = opd.run(file, {"rounds": 2}, run_dir=tmp_path / "run")
    assert len(more.rounds) == 2


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda at: opd.open_run(at / "nothing"), "has no config.json"),
        (lambda at: opd.run(at / "no.yaml"), "does not exist; expected a YAML file"),
        (lambda at: opd.run({"rounds": 1}, run_dir=at), "'student' is missing"),
        (lambda at: opd.run({}), "the config is no file, which would name the run"),
        (lambda at: opd.run(SMALL_RUN, {"train.learn_rate": 1}, run_dir=at), "learning_rate"),
        (lambda at: opd.open_scores(at), "scores"),
        (lambda at: opd.open_run("x" * 5000), "expected a path of at most 4,095 bytes"),
        (lambda at: opd.run(SMALL_RUN, run_dir="a\0b"), "without the character NUL"),
        (lambda at: opd.run(SMALL_RUN, run_dir=""), "the empty text is none"),
        (lambda at: opd.run(SMALL_RUN, {"store": "\ud83d"}, run_dir=at), "half a surrogate pair"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, call: Callable[[Path], object], line: str) -> None:
    with pytest.raises(opd.UserError) as caught:
        call(tmp_path)
    assert line in " ".join(map(str, caught.value.args))


@pytest.mark.parametrize(
    "text", ["😀", "a\u2028b\x85c", "\x7f\ufeff", "\\ud83d\\ude00", "a: [#'\""]
)
def test_a_text_is_set_as_it_is(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("pipeline.run.run", lambda config, *_: seen.append(config))
    with pytest.raises(opd.UserError, match=r"no config\.json"):
        opd.run(SMALL_RUN, {"store": text}, run_dir=tmp_path)
    assert seen[0].store == text


def test_the_package_is_there_at_once_and_has_what_its_types_say() -> None:
    stub = (ROOT / "opd_stream" / "__init__.pyi").read_text()
    assert all(f"as {name}" in stub or name == "__version__" for name in opd.__all__)
    assert all(getattr(opd, name) is not None for name in opd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = opd.nothing  # pyright: ignore
    heavy = "import sys, opd_stream; assert not {'torch', 'pandas', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True, cwd=ROOT)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells in order, as Jupyter runs them, from a folder of its own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "run.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["run"].is_finished


def test_the_page_runs(finished_run: Path, tmp_path: Path) -> None:
    """Its block, on the small config and run."""
    (block,) = (each for each in blocks_of(ROOT / "docs" / "python.md") if each.kind == "python")
    fields = tmp_path / "small.yaml"
    fields.write_text(json.dumps({**SMALL_RUN, "store": str(tmp_path / "store")}))
    shutil.copytree(finished_run / "run", tmp_path / "run")
    text = block.text.replace('"configs/quickstart.yaml"', f'"{fields}"').replace(": 2,", ": 1,")
    text = text.replace('"local"}', f'"local"}}, run_dir="{tmp_path}/new"')
    names: dict[str, Any] = {}
    exec(text.replace("runs/quickstart", f"{tmp_path}/run"), names)
    assert names["run"].folder == tmp_path / "run"
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_readme_looks_at_a_run(finished_run: Path, tmp_path: Path) -> None:
    (block,) = (each for each in blocks_of(ROOT / "README.md") if each.kind == "python")
    assert block.page == "README.md"
    shutil.copytree(finished_run / "run", tmp_path / "run")
    names: dict[str, Any] = {}
    exec(block.text.replace("runs/quickstart", f"{tmp_path}/run"), names)
    assert names["run"].folder == tmp_path / "run"


def test_chat_answers_as_the_policy_samples(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["chat", str(finished_run / "run"), "--temperature", "0", "--max-new-tokens", "9"]
    answers = []
    for version in ("0", "2"):
        more = ["--policy-version", version, "--prompt", "Mia has 30 buttons."]
        monkeypatch.setattr(sys, "argv", ["opd-stream", *asked, *more, "--samples", "2"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        answers.append(capsys.readouterr().out.splitlines())
    assert all(len(found) == 2 and found[0] == found[1] != "" for found in answers)


def test_chat_reads_lines_and_remembers_turns_of_a_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(MODELS / "ledger-student", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    lines = iter(["3+4\n", "\n", "5+6\n", ""])
    monkeypatch.setattr(sys, "stdin", type("Typed", (), {"readline": lambda _: next(lines)})())
    asked = ["chat", str(folder), "--max-new-tokens", "4", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["opd-stream", *asked])
    seen: list[int] = []
    from opd_stream.rendering import Renderer

    rendered = Renderer.text
    monkeypatch.setattr(
        Renderer,
        "text",
        lambda self, prompt: seen.append(len(prompt.turns or ())) or rendered(self, prompt),
    )
    with pytest.raises(SystemExit):
        main()
    assert seen == [1, 3]
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("place", "more", "line"),
    [
        ("nowhere", ["--prompt", "x"], "nowhere"),
        (str(MODELS / "ledger-student"), ["--policy-version", "1"], "is no run; expected one"),
        (str(MODELS / "ledger-student"), ["--prompt", "a\udcff"], "half a surrogate pair"),
        (str(MODELS / "ledger-student"), [], "the byte 0xff, which is no UTF-8"),
    ],
)
def test_chat_refuses_in_one_line(
    place: str,
    more: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["opd-stream", "chat", place, *more])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def test_a_config_of_another_type_is_the_same_config(tmp_path: Path) -> None:
    fields = {**SMALL_RUN, "store": str(tmp_path)}
    assert Config.model_validate(fields) == opd.run.__globals__["_config"](fields, {})
