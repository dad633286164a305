"""Benchmarks in a config: published formats, names, one form."""

import json
import re
from pathlib import Path

import pytest
import yaml

from opd_stream.config import Evaluation
from opd_stream.config_file import load_config
from opd_stream.errors import UserError
from opd_stream.sources import read_prompts
from opd_stream.tasks.judges import BuiltInJudge, CodeJudge, FunctionJudge, judge_recipe, open_judge
from tests.conftest import SMALL_RUN, small_config

DATA = Path(__file__).parents[2] / "shared" / "data"

ROOT = Path(__file__).parent.parent

ROWS = {
    "gsm8k": ({"question": "2 + 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "final_number"),
    "math500": (
        {
            "problem": "Find $x$.",
            "solution": r"\boxed{\frac{1}{2}}",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        "math",
    ),
    "amc23": ({"id": 0, "question": "2 + 3?", "answer": 5.0, "url": "u"}, "math"),
    "aime": ({"id": 60, "problem": "2 + 3?", "answer": "005", "year": "2024"}, "math"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_format_needs_only_its_file(tmp_path: Path, name: str) -> None:
    row, judge = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    prompts = {"kind": "jsonl", "path": tmp_path / "rows.jsonl"}
    evaluation = Evaluation.model_validate(
        {"max_new_tokens": 8, "benchmarks": {name: {"format": name, "prompts": prompts}}}
    )
    part = evaluation.parts()[name]
    assert part.prompts is not None
    (prompt,) = read_prompts(part.prompts)
    assert (prompt.text, prompt.answer) == (
        row.get("question", row.get("problem")),
        str(row["answer"]),
    )
    assert part.judge == BuiltInJudge(kind=judge)  # type: ignore[arg-type]
    assert Evaluation.model_validate(evaluation.model_dump(mode="json")) == evaluation


@pytest.mark.parametrize(("name", "rows"), [("gsm8k", 1319), ("amc23", 40)])
def test_every_published_reference_is_right_by_its_own_judge(name: str, rows: int) -> None:
    path = DATA / f"{name}_test.jsonl"
    if not path.exists():
        pytest.skip("the published problems are not beside this checkout")
    prompts = {"kind": "jsonl", "path": path}
    benchmarks = {name: {"format": name, "prompts": prompts}}
    part = Evaluation.model_validate({"max_new_tokens": 8, "benchmarks": benchmarks}).parts()[name]
    if part.judge == BuiltInJudge(kind="math"):
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    assert part.prompts is not None
    assert part.judge is not None
    is_right = open_judge(part.judge)
    read = read_prompts(part.prompts)
    assert len(read) == rows
    for prompt in read:
        answer = str(prompt.answer).rpartition("#### ")[2]
        assert is_right(f"Thus the answer is \\boxed{{{answer}}}", str(prompt.answer)), prompt


def test_the_import_path_of_a_config_file_is_no_file_path(tmp_path: Path) -> None:
    judge = {"kind": "function", "path": "my_package.judges:right"}
    evaluation = {**SMALL_RUN["evaluation"], "judge": judge}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SMALL_RUN, "evaluation": evaluation}))
    found = load_config(tmp_path / "run.yaml", []).evaluation
    assert found is not None
    assert found.judge == FunctionJudge(kind="function", path="my_package.judges:right")
    recipe = judge_recipe(BuiltInJudge(kind="ledger"))
    assert recipe == {"kind": "ledger"}  # names older verdicts too


def test_a_config_of_two_forms_or_none_is_one_line(tmp_path: Path) -> None:
    entry = "{gsm8k: {format: gsm8k, prompts: {kind: jsonl, path: x.jsonl}}}"
    cases = {
        f"evaluation.benchmarks={entry}": "stands beside kind, prompts or judge",
        "evaluation.judge=null": r"'evaluation\.judge' is missing; expected prompts and judge",
        "evaluation={max_new_tokens: 8, benchmarks: {}}": "is empty; expected named entries",
        "evaluation.pass_at=[4]": r"asks for pass@4 but ledger has 2 samples",
        "evaluation.judge.kind=maths": r"'evaluation\.judge\.kind' is 'maths'; expected",
        "evaluation.judge={kind: function, path: own_judge}": "expected the import path package",
        f"evaluation={{max_new_tokens: 8, benchmarks: {entry.replace('gsm8k:', 'a b:', 1)}}}": (
            "has the name 'a b'"
        ),
    }
    for override, line in cases.items():
        with pytest.raises(UserError, match=line) as caught:
            small_config(tmp_path, override)
        assert "\n" not in str(caught.value), override


def test_the_configs_of_the_pages_are_such() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("evaluation.md", "judges.md")]
    found = [re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for page in pages]
    (block, distance), (_, programs) = found
    parts = Evaluation.model_validate(yaml.safe_load(block)["evaluation"]).parts()
    assert [part.samples_per_prompt for part in parts.values()] == [1, 8]
    for part in parts.values():
        assert part.judge == BuiltInJudge(kind="math")
        assert part.prompts is not None
        assert part.prompts.template.text.endswith("within \\boxed{}.")
    for part in Evaluation.model_validate(yaml.safe_load(programs)["evaluation"]).parts().values():
        assert part.judge == CodeJudge(kind="code", allow_code_execution=True)
    assert Evaluation.model_validate(yaml.safe_load(distance)["evaluation"]).kind == "distance"
