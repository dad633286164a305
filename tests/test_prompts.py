"""Prompts: read from three kinds of source, templated, counted; mistakes are named."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import zstandard
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_stream import sources
from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table, shuffled_rows
from opd_stream.rendering import ChatTemplate, RawTemplate, Renderer, raw_ids
from opd_stream.sources import DatasetPrompts, EmbeddedPrompts, FilePrompts, read_prompts
from opd_stream.store.artifact import Artifact, Commit
from opd_stream.store.store import Store
from pipeline.estimate.prompts import FastTokenizer
from stages.checkpoints import open_checkpoint
from stages.prompts import PromptRows, make_prompts, prompts_artifact
from tests.test_messages import CHATML

STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"
ROWS = [{"prompt": "What is 2+2?", "answer": "4"}, {"prompt": "Und 3·3 — naïve?", "answer": "9"}]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(STUDENT)


def jsonl(folder: Path, text: str, **fields: object) -> FilePrompts:
    path = folder / "prompts.jsonl"
    path.write_text(text)
    return FilePrompts(kind="jsonl", path=path, answer_field="answer", **fields)  # type: ignore[arg-type]


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
        FilePrompts(kind="jsonl", path=packed, answer_field="answer"),
        DatasetPrompts(kind="datasets", path=str(tmp_path / "saved"), answer_field="answer"),
        DatasetPrompts(kind="datasets", path="json", data_files=plain.path, answer_field="answer"),
    ]
    tables = [prompts_table(source, tokenizer) for source in sources]
    assert all(table.equals(tables[0]) for table in tables)
    assert tables[0]["answer"].to_pylist() == ["4", "9"]


def with_edges(single: list[str]) -> Any:
    """The student's tokenizer with a post-processor of its own."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    special = [("<eos>", 1), ("<bos>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[each for each in special if each[0] in single]
    )
    return tokenizer


def test_raw_text_has_the_ids_of_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    source, texts = jsonl(tmp_path, lines_of(ROWS)), [row["prompt"] for row in ROWS]
    for own in (tokenizer, with_edges(["<bos>", "$A"])):
        ids = prompts_table(source, own)["prompt_ids"].to_pylist()
        assert ids == [own(text)["input_ids"] for text in texts]
    assert tokenizer.decode(tokenizer(texts[1])["input_ids"]) == texts[1]


def test_the_embedded_tasks_begin_with_bos_and_decode_to_the_text(tokenizer: Any) -> None:
    table = prompts_table(EmbeddedPrompts(kind="ledger", count=1, seed=0), tokenizer)
    first, *ids = table["prompt_ids"][0].as_py()
    assert first == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == table["text"][0].as_py() + "\n"


@pytest.mark.parametrize(
    ("single", "bos", "text", "ids"),
    [
        (["$A"], "tokenizer", "a", [67]),
        (["$A"], "always", "a", [2, 67]),
        (["$A"], "always", "<bos>a", [2, 67]),
        (["<bos>", "$A"], "tokenizer", "<bos>a", [2, 67]),  # rendered before
        (["<bos>", "$A"], "always", "a", [2, 67]),
        (["<bos>", "$A", "<eos>"], "tokenizer", "a", [2, 67]),  # is to be continued
        (["$A", "<eos>"], "tokenizer", "a", [67]),
        (["$A", "<eos>"], "tokenizer", "a<eos>", [67, 1]),  # the text's own end stays
        (["<bos>", "$A"], "tokenizer", "a<eos>", [2, 67, 1]),
        (["<bos>", "$A"], "tokenizer", "", [2]),
    ],
)
def test_a_raw_prompt_begins_once_and_is_never_ended(
    single: list[str], bos: Any, text: str, ids: list[int], tmp_path: Path
) -> None:
    tokenizer = with_edges(single)
    assert raw_ids(tokenizer, text, bos=bos) == ids
    tokenizer.save_pretrained(tmp_path)
    assert raw_ids(FastTokenizer(tmp_path), text, bos=bos) == ids


def test_a_tokenizer_without_special_tokens_adds_none(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert raw_ids(bare, "a", bos="always") == [67]


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
        ("[1]\n", r"prompts\.jsonl row 0 holds a int; expected one JSON object"),
        ("\n\n", "holds no prompts"),
        ('{"question": "a"}\n', r"has no field 'prompt'; it has question"),
        ('{"prompt": 3, "answer": 1}\n', "field 'prompt' holds a int"),
        ('{"prompt": "a"}\n', "has no field 'answer'"),
        (
            '{"prompt": "a\\ud83d", "answer": 1}\n',
            r"jsonl:1 holds \\ud83d alone, half a surrogate",
        ),
        ('{"prompt": "a", "answer": "\\ude00"}\n', r"jsonl:1 holds \\ude00 alone"),
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
        read_prompts(FilePrompts(kind="jsonl", path=path))


def test_a_zst_file_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.zst"
    rows = [{"prompt": f"What is {n}*{n}?", "answer": str(n * n)} for n in range(9000)]
    whole = zstandard.compress(lines_of(rows[:4000]).encode())
    path.write_bytes(whole + zstandard.compress(lines_of(rows[4000:]).encode()))
    source = FilePrompts(kind="jsonl", path=path)
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


def test_several_fields_make_up_a_prompt_and_its_reference(tmp_path: Path) -> None:
    rows = [
        {"text": "Double x.", "test_list": ["assert f(1) == 2", "assert f(2) == 4"], "imports": []},
        {"text": "{text}", "test_list": ["assert f() == 'é'"]},
    ]
    pattern = "{text} Tests:\n{test_list}"
    source = jsonl(
        tmp_path,
        "".join(json.dumps(row) + "\n" for row in rows),
        prompt_field=pattern,
        answer_fields=["test_list", "imports?"],
    )
    first, second = read_prompts(source)
    assert first.text == "Double x. Tests:\nassert f(1) == 2\nassert f(2) == 4"
    assert second.text == "{text} Tests:\nassert f() == 'é'"
    assert [json.loads(str(each.answer)) for each in (first, second)] == [
        {"test_list": rows[0]["test_list"], "imports": []},
        {"test_list": rows[1]["test_list"]},
    ]
    with pytest.raises(UserError, match="has no field 'imports'"):
        read_prompts(source.model_copy(update={"answer_fields": ("imports",)}))


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


def test_without_a_network_a_data_set_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Session:
        def head(self, address: str, timeout: float) -> None:
            raise ConnectionError(address, timeout)

    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    sources._leave_out_hub.cache_clear()
    with pytest.raises(UserError, match=r"OfflineModeIsEnabled.*hf download org/none"):
        read_prompts(DatasetPrompts(kind="datasets", path="org/none"))
    sources._leave_out_hub.cache_clear()


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


def test_rows_of_prompts_are_read_from_the_parts_that_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four shards; a unit's cost does not grow with the prompts."""
    monkeypatch.setattr("stages.prompts.ROWS_PER_SHARD", 150)
    store = Store(tmp_path)
    source = EmbeddedPrompts(kind="ledger", count=500, seed=0)
    made = make_prompts(store, source, open_checkpoint(store, STUDENT))
    assert len(made.units()) == 4
    whole, rows = made.read_all(), PromptRows(store, made.fingerprint)
    asked = [499, 3, 150, 149, 3, 64, 63]
    read: list[tuple[int, int]] = []
    plain = made.read_part

    def counted(self: Artifact, commit: Commit, number: int, schema: pa.Schema) -> pa.RecordBatch:
        read.append((commit.unit, number))
        return plain(commit, number, schema)

    monkeypatch.setattr(Artifact, "read_part", counted)
    assert rows.read(asked).to_pylist() == whole.take(asked).to_pylist()
    assert read == [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0)]
    assert len(rows) == 500
    assert rows.read([]).num_rows == 0


@pytest.mark.parametrize("template", [RawTemplate(), ChatTemplate(text="Solve. {prompt}")])
def test_prompts_that_are_made_in_pieces_are_those_that_are_made_at_once(
    template: RawTemplate | ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of three rows, shards of four and a file for what memory does not hold."""
    texts = [f"row {n} " + "and more " * (n % 4) for n in range(23)]
    limit = 24 if template.kind == "raw" else 40
    more = {"template": template, "max_prompt_tokens": limit, "long_prompts": "skip"}
    source = jsonl(tmp_path, lines_of([{"prompt": text, "answer": text} for text in texts]), **more)
    student = shutil.copytree(STUDENT, tmp_path / "student")
    (student / "chat_template.jinja").write_text(CHATML)
    opened = open_checkpoint(Store(tmp_path), student)
    at_once = make_prompts(Store(tmp_path / "at-once"), source, opened)
    monkeypatch.setattr("stages.prompts.ROWS_PER_SHARD", 4)
    monkeypatch.setattr("stages.prompts.BYTES_IN_MEMORY", 100)
    monkeypatch.setattr("opd_stream.prompts.ROWS_AT_ONCE", 3)
    made = make_prompts(Store(tmp_path / "pieces"), source, opened)
    assert len(made.units()) > 2
    assert made.read_all().to_pylist() == at_once.read_all().to_pylist()
    assert made.manifest().counts == at_once.manifest().counts
    assert 0 < made.manifest().counts["skipped_long"] < len(texts)
    renderer = Renderer(template, opened.tokenizer())
    alone = [renderer.ids(prompt).tolist() for prompt in read_prompts(source)]
    assert made.read_all()["prompt_ids"].to_pylist() == [ids for ids in alone if len(ids) <= limit]


def test_a_damaged_shard_of_prompts_is_made_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stages.prompts.ROWS_PER_SHARD", 4)
    store, student = Store(tmp_path), open_checkpoint(Store(tmp_path), STUDENT)
    source = EmbeddedPrompts(kind="ledger", count=10, seed=0)
    made = make_prompts(store, source, student)
    before, times = made.read_all(), [made.commit_record(unit) for unit in made.units()]
    shard = made.folder / made.commits()[1].file
    shard.write_bytes(shard.read_bytes()[:-1])
    again = make_prompts(store, source, student)
    assert again.read_all() == before
    assert "is damaged" in caplog.text
    is_kept = [made.commit_record(unit) == old for unit, old in enumerate(times)]
    assert is_kept == [True, False, True]


def test_a_damaged_shard_of_another_size_is_made_again_in_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout is that of the first writer, an earlier version with larger shards, say."""
    store, student = Store(tmp_path), open_checkpoint(Store(tmp_path), STUDENT)
    source = EmbeddedPrompts(kind="ledger", count=10, seed=0)
    made = make_prompts(store, source, student)
    before = made.read_all()
    shard = made.folder / made.commits()[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr("stages.prompts.ROWS_PER_SHARD", 4)
    again = make_prompts(store, source, student)
    assert again.read_all() == before
    assert [record.counts["rows"] for record in again.commits().values()] == [10]


def test_a_folder_in_place_of_a_shard_is_one_line(tmp_path: Path) -> None:
    store, student = Store(tmp_path), open_checkpoint(Store(tmp_path), STUDENT)
    source = EmbeddedPrompts(kind="ledger", count=4, seed=0)
    made = make_prompts(store, source, student)
    shard = made.folder / made.commits()[0].file
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=r"is a folder; expected a file .* move the folder away"):
        make_prompts(store, source, student)
