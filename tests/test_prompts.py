"""Prompts: read from three kinds of source, templated, counted; mistakes are named."""

import json
import shutil
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import zstandard
from transformers import AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.prompts import (
    ChatTemplate,
    DatasetPrompts,
    EmbeddedPrompts,
    JsonlPrompts,
    prompts_table,
    read_prompts,
    shuffled_rows,
)
from opd_stream.store.store import Store
from stages.checkpoints import open_checkpoint
from stages.prompts import prompts_artifact

STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"
ROWS = [{"prompt": "What is 2+2?", "answer": "4"}, {"prompt": "Und 3·3 — naïve?", "answer": "9"}]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(STUDENT)


def jsonl(folder: Path, text: str, **fields: object) -> JsonlPrompts:
    path = folder / "prompts.jsonl"
    path.write_text(text)
    return JsonlPrompts(kind="jsonl", path=path, answer_field="answer", **fields)  # type: ignore[arg-type]


def lines_of(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_plain_compressed_and_dataset_sources_give_the_same_prompts(
    tmp_path: Path, tokenizer: object
) -> None:
    plain = jsonl(tmp_path, lines_of(ROWS))
    packed = tmp_path / "prompts.jsonl.zst"
    packed.write_bytes(zstandard.compress(lines_of(ROWS).encode()))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    sources = [
        plain,
        JsonlPrompts(kind="jsonl", path=packed, answer_field="answer"),
        DatasetPrompts(kind="datasets", path=str(tmp_path / "saved"), answer_field="answer"),
        DatasetPrompts(kind="datasets", path="json", data_files=plain.path, answer_field="answer"),
    ]
    tables = [prompts_table(source, tokenizer) for source in sources]
    assert all(table.equals(tables[0]) for table in tables)
    assert tables[0]["answer"].to_pylist() == ["4", "9"]


def test_the_raw_template_starts_with_bos_and_decodes_to_the_text(
    tmp_path: Path, tokenizer: object
) -> None:
    table = prompts_table(jsonl(tmp_path, lines_of(ROWS)), tokenizer)
    ids = table["prompt_ids"][1].as_py()
    assert ids[0] == tokenizer.bos_token_id  # type: ignore[attr-defined]
    assert tokenizer.decode(ids[1:]) == ROWS[1]["prompt"]  # type: ignore[attr-defined]


def test_the_chat_template_is_the_tokenizers_own(tmp_path: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(STUDENT)
    source = jsonl(tmp_path, lines_of(ROWS), template=ChatTemplate(kind="chat", system="Be brief."))
    with pytest.raises(UserError, match="has no chat template"):
        prompts_table(source, chatty)
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[go]"
    ids = prompts_table(source, chatty)["prompt_ids"][0].as_py()
    assert chatty.decode(ids) == "[system]Be brief.[user]What is 2+2?[go]"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"prompt": "a", "answer": 1}\n{"prompt": \n', r"prompts\.jsonl:2 is not valid JSON"),
        ("[1]\n", r"prompts\.jsonl:1 holds a list; expected one JSON object"),
        ("\n\n", "holds no prompts"),
        ('{"question": "a"}\n', r"has no field 'prompt'; it has question"),
        ('{"prompt": 3, "answer": 1}\n', "field 'prompt' holds a int"),
        ('{"prompt": "a"}\n', "has no field 'answer'"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_prompts(jsonl(tmp_path, text))


def test_duplicate_ids_are_refused_with_both_places(tmp_path: Path) -> None:
    text = lines_of([{"prompt": "a", "answer": "1", "id": "x"}] * 2)
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: id 'x' stands at .*prompts\.jsonl:1"):
        read_prompts(jsonl(tmp_path, text, id_field="id"))


def test_a_torn_zst_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl.zst"
    path.write_bytes(b"not zstd at all")
    with pytest.raises(UserError, match="not a whole zstd file"):
        read_prompts(JsonlPrompts(kind="jsonl", path=path))


def test_a_zst_file_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.zst"
    rows = [{"prompt": f"What is {n}*{n}?", "answer": str(n * n)} for n in range(9000)]
    whole = zstandard.compress(lines_of(rows[:4000]).encode())
    path.write_bytes(whole + zstandard.compress(lines_of(rows[4000:]).encode()))
    source = JsonlPrompts(kind="jsonl", path=path)
    assert len(read_prompts(source)) == 9000  # two frames
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a whole zstd file"):
        read_prompts(source)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path, "")
    source.path.write_bytes('{"prompt": "naïve", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(source)


def test_a_null_answer_is_none_and_a_null_id_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path, '{"prompt": "a", "answer": null, "id": null}\n')
    assert [prompt.answer for prompt in read_prompts(source)] == [None]
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: field 'id' is null; expected an id"):
        read_prompts(source.model_copy(update={"id_field": "id"}))


def test_another_template_is_another_artifact(tmp_path: Path) -> None:
    source = EmbeddedPrompts(kind="ledger", count=2, seed=0)
    folder, names = tmp_path / "student", list[str]()
    shutil.copytree(STUDENT, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for change in ({}, {"chat_template": "{{ messages }}"}, {"bos_token": None}):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **change}))
        store = Store(str(tmp_path / "store"))
        names.append(prompts_artifact(store, source, open_checkpoint(store, folder)).name)
    assert len(set(names)) == 3


def test_a_long_prompt_is_refused_or_skipped_as_asked(tmp_path: Path, tokenizer: object) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "long " * 50, "answer": "2"}]
    refuse = jsonl(tmp_path, lines_of(rows), max_prompt_tokens=20)
    with pytest.raises(UserError, match=r"'row-1' has \d+ tokens; the limit is 20"):
        prompts_table(refuse, tokenizer)
    skip = jsonl(tmp_path, lines_of(rows), max_prompt_tokens=20, long_prompts="skip")
    assert prompts_table(skip, tokenizer)["prompt_id"].to_pylist() == ["row-0"]


def test_a_missing_dataset_is_one_line(tmp_path: Path) -> None:
    source = DatasetPrompts(kind="datasets", path="json", data_files=tmp_path / "none.jsonl")
    with pytest.raises(UserError):
        read_prompts(source)


def test_the_rounds_of_a_pass_share_no_prompt_and_cover_it() -> None:
    rounds = [shuffled_rows(rows=20, seed=3, round_index=r, per_round=5) for r in range(8)]
    assert sorted(chain.from_iterable(rounds[:4])) == list(range(20))
    assert sorted(chain.from_iterable(rounds[4:])) == list(range(20))
    assert rounds[0] != rounds[4]
    assert rounds == [shuffled_rows(rows=20, seed=3, round_index=r, per_round=5) for r in range(8)]


def test_more_prompts_a_round_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="prompts_per_round is 9 but there are 8 prompts"):
        shuffled_rows(rows=8, seed=0, round_index=0, per_round=9)


def test_ledger_prompts_carry_their_answers(tokenizer: object) -> None:
    source = EmbeddedPrompts(kind="ledger", count=3, seed=7)
    table: pa.Table = prompts_table(source, tokenizer)
    assert table["prompt_id"].to_pylist() == ["ledger-7-0", "ledger-7-1", "ledger-7-2"]
    assert all(len(answer) == 2 for answer in table["answer"].to_pylist())
