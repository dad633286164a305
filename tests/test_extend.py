"""The page on extensions is enough: its code and its steps, in a copy of the library, work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import SMALL_RUN

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
FILES = {
    block.split("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
SECTION = '''class {name}(Section):
    """Of the page."""

    kind: Literal["{kind}"]
{fields}

'''
NUMBER = '    {name}: int = Field(ge=1, description="of the page")\n'
WEIGHT = '    weight: float = Field(default=1.0, gt=0, description="of the page")\n'
CLASS = (
    "@dataclass(frozen=True, slots=True, kw_only=True)\nclass Jeffreys:\n    weight: float = 1.0\n"
)
CHECK = """
import sys
from pathlib import Path
import torch
from opd_stream.config_file import load_config
from opd_stream.engines import open_engine
from opd_stream.objectives import build_objectives, token_losses
from opd_stream.windows import build_window, window_tokens
import opd_stream
from test_my_objective import TEACHER, inputs

config = load_config(Path("it.yaml"), [])
assert Path(opd_stream.__file__).is_relative_to(Path.cwd())
window = build_window(**config.rollouts.window.model_dump())
assert [window_tokens(window, step) for step in (0, 50, 999)] == [64, 128, 300]
objectives = build_objectives([part.model_dump() for part in config.train.objective])
assert token_losses(objectives, inputs(TEACHER.log())).abs().max() < 1e-12
assert token_losses(objectives, inputs(torch.zeros(1, 4).double())).min() > 0.01
engine = open_engine(engine=config.student.engine, folder=Path("s"), dtype="float32", batch_rows=1)
assert engine.tokens == 0
"""


def changed(path: Path, *changes: tuple[str, str]) -> None:
    """Put text before the only place where some other text stands."""
    text = path.read_text()
    for anchor, new in changes:
        assert text.count(anchor) == 1, anchor
        text = text.replace(anchor, new + anchor)
    path.write_text(text)


def named(path: str) -> str:
    """A path, which the page must name as one to change."""
    assert f"`{path}`" in PAGE.split("## A judge")[0]
    return path


def extend(library: Path) -> None:
    """The steps of the page, and no file but those of its table."""
    own = FILES["my_objective.py"].replace("objectives import Obj", "objectives.inputs import Obj")
    (library / "opd_stream/objectives/my_objective.py").write_text(own)
    (library / "opd_stream/engines/my_engine.py").write_text(FILES["my_engine.py"])
    changed(
        library / named("opd_stream/windows.py"),
        ("Window = FixedWindow", FILES["my_window.py"].split("import dataclass\n")[1] + "\n\n"),
        ("FixedWindow | RatioWindow |", "DoublingWindow | "),
        (
            "        case FixedWindow(",
            "        case DoublingWindow(): return doubled(window, step)\n",
        ),
        ('"fixed": FixedWindow', '"doubling": DoublingWindow, '),
    )
    fields = "".join(NUMBER.format(name=name) for name in ("h0", "every", "max_window_tokens"))
    changed(
        library / named("opd_stream/config/collection.py"),
        (
            "Window = Annotated",
            SECTION.format(name="DoublingWindowConfig", kind="doubling", fields=fields),
        ),
        ("FixedWindowConfig | ", "DoublingWindowConfig | "),
        ('"transformers", "vllm", "fake"', '"counting", '),
    )
    changed(
        library / named("opd_stream/objectives/__init__.py"),
        ("from opd_stream.objectives.sampled", "from .my_objective import jeffreys\n"),
        ("Objective = Bucket", f"{CLASS}\n\n"),
        ("Bucket | Skew | Lsm", "Jeffreys | "),
        ('    "bucket": Bucket', '    "jeffreys": Jeffreys,\n'),
        (
            '        case Bucket(direction="reverse")',
            "        case Jeffreys(): return jeffreys(inputs)\n",
        ),
    )
    changed(
        library / named("opd_stream/config/training.py"),
        ("Objective = Annotated", SECTION.format(name="Mine", kind="jeffreys", fields=WEIGHT)),
        ("BucketObjective\n    |", "Mine | "),
    )
    changed(
        library / named("opd_stream/engines/__init__.py"),
        (
            '    if engine == "fake"',
            '    if engine == "counting":\n'
            "        from .my_engine import CountingEngine\n"
            "        return CountingEngine(folder)\n",
        ),
    )


def test_the_steps_of_the_page_are_enough(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "opd_stream", tmp_path / "opd_stream")
    extend(tmp_path)
    for name in ("my_objective.py", "test_my_objective.py"):
        (tmp_path / name).write_text(FILES[name])
    (window,) = re.findall(r"`window: (\{kind: doubling.*?\})`", PAGE)
    config = {
        **SMALL_RUN,
        "student": {**SMALL_RUN["student"], "engine": "counting"},
        "rollouts": {"prompts_per_round": 8, "window": yaml.safe_load(window)},
        "train": {**SMALL_RUN["train"], "objective": {"kind": "jeffreys"}},
    }
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "check.py").write_text(CHECK)
    done = subprocess.run(
        [sys.executable, "check.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
