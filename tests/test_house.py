"""The house rules: imports point down, commands answer at once, docs say what the code says."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from opd_stream.config_docs import config_markdown

ROOT = Path(__file__).parent.parent
FLOORS = {"opd_stream": 0, "stages": 1, "pipeline": 2}
HEAVY = {"torch", "ray", "vllm", "lightning", "transformers", "datasets"}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
}
LONGEST_FUNCTION = 60  # lines, decorators and docstring included


def imports_of(tree: ast.AST) -> set[str]:
    """Top-level packages that the given nodes import."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def imports_when_loaded(path: Path) -> set[str]:
    """Packages that loading the module imports (not those inside functions or TYPE_CHECKING)."""
    module = ast.parse(path.read_text())
    top = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports_of(ast.Module(body=top, type_ignores=[]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = FLOORS[path.relative_to(ROOT).parts[0]]
    above = {name for name, level in FLOORS.items() if level > floor}
    assert not imports_of(ast.parse(path.read_text())) & above
    if floor == 0:
        assert not imports_of(ast.parse(path.read_text())) & {"ray", "lightning"}
    if floor == 2:
        assert not imports_when_loaded(path) & HEAVY


def test_only_the_launcher_names_a_module_of_a_floor_above() -> None:
    """It starts the command line, and cannot import what it has yet to find."""
    for path in SOURCES:
        floor = FLOORS[path.relative_to(ROOT).parts[0]]
        above = "|".join(name for name, level in FLOORS.items() if level > floor) or "nothing"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_above = re.fullmatch(rf"({above})\.[\w.:]+", node.value)
                assert not is_above or path == ROOT / "opd_stream" / "launcher.py", (path, is_above)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def modules_imported_by(path: Path) -> set[str]:
    """Modules of the floors that a file imports, anywhere but under TYPE_CHECKING."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        waiting += [each for each in ast.iter_child_nodes(node) if not is_for_types(each)]
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in inner}
    return found & set(NAMES)


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: modules_imported_by(path) - {name} for name, path in NAMES.items()}
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, "in a circle, or above one"


def test_a_function_fits_on_a_screen() -> None:
    long: dict[str, int] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min(part.lineno for part in (node, *node.decorator_list))
                long[f"{path.relative_to(ROOT)}: {node.name}"] = (node.end_lineno or 0) - first + 1
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}


@pytest.mark.parametrize(
    "module", ["pipeline.cli", "pipeline.rounds", "stages.executors", "opd_stream.config_file"]
)
def test_a_module_loads_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_help_answers_in_under_a_second() -> None:
    """Of CPU time: a busy machine takes longer."""
    command = [sys.executable, "-m", "pipeline", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "generate" in found.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--set", "rounds=none"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("opd-stream: 'rounds' is 'none'")
    assert len(found.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_config_page_is_the_config() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == config_markdown(), (
        "run: python -m opd_stream.config_docs > docs/config.md"
    )


def test_nothing_unpickles_what_it_reads() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    for path in SOURCES:
        text = path.read_text()
        assert not imports_of(ast.parse(text)) & forbidden, path
        assert "torch.load" not in text, path
        assert "trust_remote_code=True" not in text, path
