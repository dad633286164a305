"""Prompts from files as people have them: formats, packing, nested fields, and what is refused."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError
from transformers import AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.prompts import lost_rows, tokenised_prompts
from opd_stream.rendering import Prompt
from opd_stream.sources import (
    DatasetPrompts,
    EmbeddedPrompts,
    FilePrompts,
    read_prompts,
    row_count,
    source_settings,
)
from opd_stream.store.lines import CHUNK_BYTES, lines_of
from opd_stream.store.store import Store
from opd_stream.tasks.judges import BuiltInJudge, open_judge
from opd_stream.tasks.references import answers_of, reference_text, right_answer
from pipeline.setup import open_setup
from stages.checkpoints import open_checkpoint
from stages.prompts import make_prompts, rows_left_out
from tests.conftest import small_config

STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"
ROWS = [
    {"prompt": "What is 2+2?", "answer": "4"},
    {"prompt": 'Und "3·3",\nnaïve?', "answer": "007"},
]


def read(path: Path, **fields: Any) -> list[Prompt]:
    settings = {"kind": "files", "path": path, "answer_field": "answer", **fields}
    return read_prompts(FilePrompts.model_validate(settings))


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


FORMATS: dict[str, bytes] = {
    "rows.jsonl": json_lines(ROWS),
    "rows.ndjson": json_lines(ROWS).replace(b"\n", b"\r\n") + b"\r\n\n  \n",
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": json_lines(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + json_lines(ROWS),
    "rows.csv": b"\xef\xbb\xbf" + csv_bytes(","),
    "rows.tsv": csv_bytes("\t"),
    "rows.parquet": parquet_bytes(),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(name: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACKERS[packing](FORMATS[name]))
    if name.endswith(".parquet") and packing:
        with pytest.raises(UserError, match="is of no known format"):
            read(path)
        return
    found = read(path)
    assert [prompt.text.replace("\r\n", "\n") for prompt in found] == [r["prompt"] for r in ROWS]
    assert [prompt.answer for prompt in found] == ["4", "007"]
    assert [prompt.prompt_id for prompt in found] == ["row-0", "row-1"]
    assert row_count(FilePrompts(kind="files", path=path)) == 2


def test_a_folder_is_its_files_sorted_and_a_pattern_is_some_of_them(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "second"), ("a.jsonl", "first"), ("sub/c.jsonl.gz", "third")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = json_lines([{"prompt": text, "answer": 1}])
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS"):
        (tmp_path / name).write_text("no row")
    assert [prompt.text for prompt in read(tmp_path)] == ["first", "second", "third"]
    assert [prompt.text for prompt in read(tmp_path / "b*.jsonl")] == ["second"]
    before = source_settings(FilePrompts(kind="files", path=tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "B2.jsonl")
    after = source_settings(FilePrompts(kind="files", path=tmp_path))
    assert before != after  # it sorts before a.jsonl now: another order of rows
    (tmp_path / "d.csv").write_text("prompt,answer\n")
    with pytest.raises(UserError, match=r"files of several formats, such as .*; expected one"):
        read(tmp_path)


def test_a_source_is_named_by_content_and_not_by_place(tmp_path: Path) -> None:
    names: list[Any] = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.csv").write_bytes(FORMATS["rows.csv"])
        source = FilePrompts(kind="files", path=tmp_path / place / "rows.csv")
        names.append(source_settings(source))
        names.append(source_settings(source.model_copy(update={"path": tmp_path / place})))
    assert names[0] == names[1] == names[2] == names[3]
    assert str(tmp_path) not in json.dumps(names)


def test_settings_at_their_defaults_are_not_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(FORMATS["rows.jsonl"])
    source = FilePrompts(kind="jsonl", path=tmp_path / "rows.jsonl")
    assert "answers" not in source_settings(source)
    changed = source.model_copy(update={"answers": "all"})
    assert source_settings(changed) == {**source_settings(source), "answers": "all"}


NESTED = {
    "prompt.text": "literal",
    "extra_info": {"question": "nested", "answer": 0.5, "turns": ["one", "two"]},
    "reward_model": {"ground_truth": ["4", 4, True]},
    "answer": None,
}


def test_dotted_fields_reach_into_rows_and_a_literal_name_wins(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([NESTED]))

    def first(prompt_field: str, answer_field: str, **fields: Any) -> tuple[str, str | None]:
        fields = {"prompt_field": prompt_field, "answer_field": answer_field, **fields}
        (prompt,) = read(path, **fields)
        return prompt.text, prompt.answer

    assert first("prompt.text", "extra_info.answer") == ("literal", "0.5")
    assert first("extra_info.question", "answer") == ("nested", None)
    assert first("extra_info.turns.1", "reward_model.ground_truth") == (
        "two",
        '{"any": ["4", "4", "True"]}',
    )
    everything = first("prompt.text", "reward_model.ground_truth", answers="all")[1]
    assert everything == '{"all": ["4", "4", "True"]}'


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.jsonl", b'{"prompt": "a", "answer": 1}\n{"prompt": \n', r"a\.jsonl:2 is not valid"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', r"a\.json:2 is not valid JSON"),
        ("a.json", b'[{"prompt": "a", "answer": 1}, 3]', r"a\.json row 1 holds a int; expected"),
        ("a.json", b'{\n "data": []\n}', r"a\.json:1 is not valid JSON .*one array of objects"),
        ("a.json", b"[" * 100_000, r"a\.json:1 is not valid JSON"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.csv", b"prompt,answer\n", "holds no prompts"),
        ("a.csv", b"prompt,answer\na,1\nb,2,3\n", r"a\.csv:3 has more values than .*\(2\)"),
        ("a.csv", b"prompt,answer\na\n", r"a\.csv:2 has fewer values"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv:1 names the column 'prompt' twice"),
        ("a.csv", b'prompt,answer\n"a" b,1\n', r"a\.csv:2 is not valid CSV"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a whole Parquet file"),
        ("a.jsonl.gz", b"no", r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-6], "is not a whole gzip file"),
        ("a.txt", b"What?", r"a\.txt is of no known format; expected a name that ends in \.jsonl"),
        ("a.jsonl", b'{"promt": "a"}', "has no field 'prompt'; it has promt; did you mean 'promt'"),
        ("a.jsonl", b'{"prompt": null, "answer": 1}', r"a\.jsonl:1: field 'prompt' is null"),
        ("a.jsonl", b'{"prompt": ["a"], "answer": 1}', "field 'prompt' holds a list"),
        (
            "a.jsonl",
            b'{"prompt": "a", "answer": {"b": 1}}',
            r"holds a dict with b; .*answer\.FIELD",
        ),
        ("a.jsonl", b'{"prompt": "a", "answer": [1, null]}', "field 'answer' holds a list"),
        (
            "a.jsonl",
            b'{"prompt": "bad \\ud83d end", "answer": 1}',
            r"a\.jsonl:1 holds \\ud83d alone, half a",
        ),
        ("a.jsonl", b'{"prompt": "a", "answer": "\\udc00"}', r"holds \\udc00 alone"),
        ("a.jsonl", "ä".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(
    name: str, data: bytes, line: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=line) as refused:
        read(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "path", "line"),
    [
        ("jsonl", ".", "is a folder; expected a file of JSON lines; set kind=files"),
        ("files", ".", "holds no such file; expected a name that ends in"),
        ("files", "none.csv", r"none\.csv does not exist"),
        ("jsonl", "none.jsonl", "does not exist; expected JSON lines"),
    ],
)
def test_a_path_that_leads_to_nothing_readable_is_one_line(
    kind: str, path: str, line: str, tmp_path: Path
) -> None:
    source = FilePrompts.model_validate({"kind": kind, "path": tmp_path / path})
    with pytest.raises(UserError, match=line):
        source_settings(source)
    with pytest.raises(UserError, match=line):
        read_prompts(source)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": None}, "field 'question' is null; expected text"),
        ({"question": {"text": "a"}}, "field 'question' holds a dict with text; expected text"),
        ({"question": ["a", None]}, "field 'question' holds a list; expected text"),
    ],
)
def test_what_is_no_text_is_not_written_into_a_prompt(
    row: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([row]))
    with pytest.raises(UserError, match=line):
        read(path, prompt_field="Solve: {question}", answer_field=None)


def test_a_damaged_file_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    source = FilePrompts(kind="files", path=tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file"):
        row_count(source)


def test_lines_longer_than_what_is_read_at_once_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    texts = ["ä" * CHUNK_BYTES, "", "b" * (3 * CHUNK_BYTES), "c"]
    path.write_text("\n".join(texts), encoding="utf-8")
    assert list(lines_of(path)) == texts
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert list(lines_of(path)) == texts


def test_only_the_limit_is_read_of_a_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS) + b"not JSON\n")
    assert len(read(path, limit=2)) == 2


def test_saved_datasets_and_their_mistakes(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")

    def texts(name: str, **fields: Any) -> list[str]:
        path = str(tmp_path / name)
        source = {"kind": "datasets", "path": path, **fields}
        return [prompt.text for prompt in read_prompts(DatasetPrompts.model_validate(source))]

    assert texts("one") == texts("splits", split="test") == [row["prompt"] for row in ROWS]
    with pytest.raises(UserError, match="has no split 'train', it has test"):
        texts("splits")
    with pytest.raises(UserError, match="is a dataset that save_to_disk wrote; expected files"):
        read(tmp_path / "one")


def test_streaming_reads_up_to_its_limit_and_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS))
    source = {"kind": "datasets", "path": "json", "data_files": path, "streaming": True}
    found = read_prompts(DatasetPrompts.model_validate({**source, "limit": 1}))
    assert [prompt.text for prompt in found] == [ROWS[0]["prompt"]]
    with pytest.raises(ValidationError, match="streaming is set for dataset 'json' without limit"):
        DatasetPrompts.model_validate(source)


def test_a_list_of_references_is_any_or_all_of_them() -> None:
    judge = open_judge(BuiltInJudge(kind="exact"))
    any_of, all_of = reference_text(["4", "four"], "any"), reference_text(["4", "four"], "all")
    assert any_of is not None
    assert all_of is not None
    assert judge("#### four", any_of)
    assert not judge("#### four", all_of)
    assert not judge("#### five", any_of)
    assert judge("#### 4", "4")
    assert judge("#### 4", reference_text(["4"], "all") or "")
    assert answers_of('{"any": [1]}') == ("any", ('{"any": [1]}',))  # text that looks like one
    assert right_answer(any_of) == "4"
    assert reference_text([], "any") is None


def test_skipped_prompts_are_counted_in_the_artifact_and_said_each_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"prompt": "long " * n, "answer": "1"} for n in (1, 2, 60, 70)]))
    fields = {"kind": "jsonl", "path": path, "max_prompt_tokens": 20, "long_prompts": "skip"}
    source = FilePrompts.model_validate(fields)
    found = tokenised_prompts(source, AutoTokenizer.from_pretrained(STUDENT))
    line = "prompts: 2 of 4 rows are left out: longer than max_prompt_tokens (long_prompts=skip)"
    assert list(lost_rows("prompts", found.table.num_rows, found.lost)) == [line]
    store = Store(str(tmp_path / "store"))
    student = open_checkpoint(store, STUDENT)
    for _ in range(2):  # made, and found
        assert list(rows_left_out(make_prompts(store, source, student), "prompts")) == [line]
    whole = make_prompts(store, EmbeddedPrompts(kind="ledger", count=2, seed=0), student)
    assert not list(rows_left_out(whole, "prompts"))


def test_a_run_warns_of_skipped_prompts_in_training_and_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        json_lines([{"prompt": "long " * n, "answer": "1"} for n in (1, 60, *[2] * 40)])
    )
    fields = f"kind: jsonl, path: {path}, max_prompt_tokens: 20, long_prompts: skip"
    config = small_config(
        tmp_path,
        f"prompts={{{fields}}}",
        f"evaluation.prompts={{{fields}, answer_field: answer}}",
        "evaluation.judge={kind: exact}",
    )
    for _ in range(2):
        said = [line for line in open_setup(config).warnings if "left out" in line]
        assert [line.split(":")[0] for line in said] == ["prompts", "evaluation (rows)"]
