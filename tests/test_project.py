"""What stands beside the code: metadata, typed packages, documented names, examples that run."""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from opd_stream import __version__
from opd_stream.errors import UserError
from opd_stream.store import open_scores
from pipeline.cli.options import PAGES
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, run, small_config

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PACKAGES = ("opd_stream", "stages", "pipeline")
PACKAGED = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "opd_stream").rglob("__init__.py")
    if "__all__" in path.read_text()
)
IMPORTED = {  # by the pages
    name
    for path in (ROOT / "docs").glob("*.md")
    for name in re.findall(r"^from (opd_stream[\w.]*) import", path.read_text(), re.MULTILINE)
}
PUBLIC = sorted({*PACKAGED, *IMPORTED})
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def test_the_citation_has_what_the_format_asks_for() -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"] == PROJECT["project"]["name"]
    assert CITATION["version"] == PROJECT["project"]["version"] == __version__
    assert CITATION["license"] == PROJECT["project"]["license"]
    assert all(author["name"] for author in CITATION["authors"])
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_the_citation_names_the_papers_that_the_code_names_and_no_other() -> None:
    sources = [*(ROOT / "opd_stream").rglob("*.py")]
    sources += [ROOT / "docs" / "methods.md", ROOT / "docs" / "objectives.md"]
    named = {paper for path in sources for paper in ARXIV.findall(path.read_text())}
    assert len(named) > 5
    cited: set[str] = set()
    for reference in CITATION["references"]:
        (paper,) = ARXIV.findall(reference["identifiers"][0]["value"])
        assert reference["url"] == f"https://arxiv.org/abs/{paper}"
        cited.add(paper)
    assert cited == named, "add to CITATION.cff what is missing there, or remove what is too much"


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"])
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]*[a-z])\b(?!-)", text, re.MULTILINE)) <= targets
    for path in re.findall(r"`((?:tests|docs|examples|opd_stream|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an installed wheel is."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="the extra dev builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as b; print(b.build_wheel({str(folder)!r}))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    with zipfile.ZipFile(folder / found.stdout.split()[-1]) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*")}
    for package in PACKAGES:
        assert f"{package}/py.typed" in held
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        expected = {
            str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts
        }
        assert expected <= held
    assert not any(name.startswith(("tests", "benchmarks", "examples", "configs")) for name in held)


def test_the_wheel_alone_writes_a_config_and_plans_the_embedded_job(
    wheel: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    for words in (["init"], ["plan", "my.yaml"]):
        command = [sys.executable, "-m", "opd_stream", *words]
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert found.returncode == 0, found.stderr
    assert "teacher" in found.stdout


def test_a_package_index_shows_the_readme_with_links_that_lead_somewhere(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text.partition("\n\n")[2])
    assert len(targets) > 20
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "License-Expression: Apache-2.0" in text
    assert PROJECT["project"]["urls"]["Documentation"].startswith(PAGES)


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-m", "opd_stream", "quickstart"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["evaluations"][-1]["pass@1"] > 0.8


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_wheel_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").read_bytes() == b""
    assert package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def _undocumented(module: ModuleType) -> Iterator[str]:
    """Public names without a docstring in their source; of a class, its public methods too."""
    own = [name for name in vars(module) if not name.startswith("_")]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if not hasattr(module, "__all__") and getattr(value, "__module__", "") != module.__name__:
            continue  # imported there
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue  # a constant or an alias; a dataclass without docstring has a made one
        (node,) = ast.parse(inspect.getsource(value)).body
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        members = node.body if isinstance(node, ast.ClassDef) else []
        functions = [part for part in members if isinstance(part, ast.FunctionDef)]
        for part in [node, *(part for part in functions if not part.name.startswith("_"))]:
            if not ast.get_docstring(part):
                yield f"{module.__name__}.{name}: {part.name}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(_undocumented(module)) == []


def test_the_library_has_public_names() -> None:
    assert {"opd_stream.store", "opd_stream.objectives", "opd_stream.windows"} <= set(PUBLIC)
    assert {"opd_stream.store", "opd_stream.engines", "opd_stream.config"} <= set(PACKAGED)


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the scores of the example's texts lie."""
    store = tmp_path_factory.mktemp("example") / "store"
    arguments = [str(ROOT / "examples" / "texts.jsonl"), "--store", str(store), "--top-k", "4"]
    return _example("score_texts").main(arguments)


def test_the_example_scores_every_token_of_the_texts(scored: str) -> None:
    texts = [json.loads(line) for line in (ROOT / "examples" / "texts.jsonl").open()]
    rows = open_scores(scored)
    assert len(rows) == len(texts)
    for row in (rows[number] for number in range(len(rows))):
        assert row.teacher_top_ids.shape == (len(row.completion_ids), 4)
        assert row.terminators == ((1,), (0,))
        assert row.completion_ids[-1] == 1
        # The texts are the task's own solutions: the teacher expects them, the student less.
        assert row.teacher_logprobs.mean() > -0.1
        assert row.behavior_logprobs.mean() < row.teacher_logprobs.mean()


def test_the_example_finds_its_scores_again(scored: str, capsys: pytest.CaptureFixture) -> None:
    store = scored.rsplit("/", 2)[0]
    arguments = [str(ROOT / "examples" / "texts.jsonl"), "--store", store, "--top-k", "4"]
    assert _example("score_texts").main(arguments) == scored
    assert "units scored: 0 of 1" in capsys.readouterr().out


def test_the_example_refuses_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in (MODELS / "ledger-teacher").iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces["!"], pieces['"'] = pieces['"'], pieces["!"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = str(ROOT / "examples" / "texts.jsonl")
    arguments = [texts, "--store", str(tmp_path / "store"), "--teacher", str(teacher)]
    with pytest.raises(UserError, match="different tokenizers"):
        _example("score_texts").main(arguments)


def test_a_step_on_the_examples_scores_lowers_the_loss(scored: str) -> None:
    before, after = _example("train_step").main([scored, "--rows", "4", "--window", "64"])
    assert 0 < after < before


def test_a_line_without_a_completion_is_named_before_anything_is_written(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"line 2 has no completion"):
        _example("score_texts").main([str(texts), "--store", str(tmp_path / "store")])
    assert not list(tmp_path.glob("store/*/*/recipe.json"))


def test_a_run_trains_on_the_examples_scores(scored: str, tmp_path: Path) -> None:
    store, _, fingerprint = scored.rsplit("/", 2)
    settings = (f"store={store}", f"replay.scores=[{fingerprint}]", "rounds=1", "evaluation=null")
    config = small_config(tmp_path, *settings, "staleness.max_epochs=1", "scores.top_k=4")
    found = run(config, RunFolder(tmp_path / "run"), progress=Silent())
    assert found["caches"][0][0]["scores"].startswith(fingerprint)
    assert found["tokens"] == {"generated": 0, "teacher_scored": 0, "trained": 8 * 48}


def test_scores_are_read_and_engines_named_without_torch(scored: str) -> None:
    without_torch = [name for name in PACKAGED if name != "opd_stream.trainers"]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers', 'ray', 'lightning', 'datasets'):\n"
        "    sys.modules[name] = None\n"  # an import of it fails
        f"for name in {without_torch!r}: importlib.import_module(name)\n"
        "from opd_stream.store import open_scores\n"
        f"print(len(open_scores({scored!r})[0].teacher_logprobs))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 10


def test_a_page_says_how_an_editor_finds_the_schema() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    (line,) = re.findall(r"# yaml-language-server: \$schema=(\S+)`", page)
    assert f"opd-stream schema --out {line}" in page
