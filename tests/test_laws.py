"""Rows that another program wrote are checked at one border, before anything reads them."""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from opd_stream.errors import UserError
from opd_stream.store import lines, open_scores
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.codecs import (
    Codec,
    CompactCodec,
    ExactCodec,
    SampledCodec,
    checked_scores,
    encode_scores,
    laws,
)
from opd_stream.store.codecs.compact import DICTIONARY_KEY
from opd_stream.store.codecs.laws import BrokenLaw
from opd_stream.store.exchange import import_scores
from opd_stream.store.parquet import parquet_rows
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import (
    _buffers,  # pyright: ignore[reportPrivateUsage]
    checked_rollouts,
    rollouts_table,
    shard_bytes,
    table_of,
)
from opd_stream.store.store import Store
from opd_stream.store.verification import damages
from opd_stream.types import RolloutBatch, ScoreBatch

LENGTHS = (3, 0, 2)
TOP = np.log(np.array([0.5, 0.25, 0.125], np.float32))


def rollouts(**changes: Any) -> RolloutBatch:
    """Three rollouts, the second without tokens."""
    fields: dict[str, Any] = {
        "prompt_id": ("a", "b", "c"),
        "sample_index": np.zeros(3, np.int32),
        "prompt_ids": tuple(np.array([2, 3]) for _ in LENGTHS),
        "completion_ids": tuple(np.arange(n) + 4 for n in LENGTHS),
        "behavior_logprobs": tuple(np.full(n, -0.5, np.float32) for n in LENGTHS),
        "finish_reason": ("stop", "length", "length"),
    }
    return RolloutBatch(**{**fields, **changes})


def scores(**changes: Any) -> ScoreBatch:
    fields: dict[str, Any] = {
        "teacher_logprobs": tuple(np.full(n, -0.5, np.float32) for n in LENGTHS),
        "teacher_top_ids": tuple(np.tile([7, 5, 6], (n, 1)) for n in LENGTHS),
        "teacher_top_logprobs": tuple(np.tile(TOP, (n, 1)) for n in LENGTHS),
        "teacher_tail_logprobs": tuple(np.full(n, TOP[2]) for n in LENGTHS),
        "teacher_forced_logprobs": tuple(np.full((n, 1), -3, np.float32) for n in LENGTHS),
        "refused": {},
    }
    return ScoreBatch(**{**fields, **changes})


def last(name: str, place: Any, value: Any, batch: Any = None) -> dict[str, Any]:
    """A column with another value in its last row."""
    rows = [np.array(row) for row in getattr(batch or scores(), name)]
    rows[-1][place] = value
    return {name: tuple(rows)}


def refusal(table: pa.Table) -> str:
    """What is said of a table of scores of the rollouts."""
    (batch,) = table.to_batches()
    with pytest.raises(BrokenLaw) as caught:
        checked_scores(batch, np.array(LENGTHS), vocabulary=10)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (last("teacher_top_ids", (1, 1), 10), "row 2: teacher_top_ids is 10 at token 1; expected"),
        (last("teacher_top_ids", (1, 1), 7), "row 2: teacher_top_ids is 7 at token 1; expected no"),
        (last("teacher_top_logprobs", (0, 0), 0.5), "teacher_top_logprobs is 0.5 at token 0"),
        (last("teacher_top_logprobs", (0, 0), np.nan), "teacher_top_logprobs is nan at token 0"),
        (last("teacher_top_logprobs", (0, slice(2)), TOP[1::-1]), "expected the most probable fi"),
        (last("teacher_top_logprobs", (0, 0), -2), "with the tail) is 0.635335 at token 0"),
        (last("teacher_top_logprobs", (0, 1), -0.7), "mass, with the tail) is 1.2"),
        (last("teacher_tail_logprobs", 1, 0), "mass, with the tail) is 1.875 at token 1"),
        (last("teacher_tail_logprobs", 1, np.inf), "teacher_tail_logprobs is inf at token 1"),
        (
            last("teacher_logprobs", 1, -np.inf),
            "teacher_logprobs is -inf at token 1; expected a",
        ),
        (last("teacher_forced_logprobs", (1, 0), 3), "teacher_forced_logprobs is 3 at token 1"),
    ],
)
def test_scores_that_are_no_distribution(changes: dict[str, Any], line: str) -> None:
    table, _ = encode_scores(ExactCodec(dtype="float32"), scores(**changes), rollouts())
    assert line in refusal(table)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (last("completion_ids", 0, 10, rollouts()), "row 2: completion_ids is 10 at token 0"),
        (
            last("prompt_ids", 0, 10, rollouts()),
            "row 2: prompt_ids is 10 at token 0; expected 0",
        ),
        (last("behavior_logprobs", 1, 0.1, rollouts()), "row 2: behavior_logprobs is 0.1 at token"),
        (last("behavior_logprobs", 1, -np.inf, rollouts()), "behavior_logprobs is -inf at token 1"),
        (
            {"finish_reason": ("stop", "eos", "stop")},
            "row 1: finish_reason is 'eos'; expected",
        ),
        ({"prompt_ids": (np.array([], int),) * 3}, "row 0: prompt_ids is empty; expected at least"),
    ],
)
def test_rollouts_that_are_none(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(BrokenLaw) as caught:
        checked_rollouts(rollouts_table(rollouts(**changes)), vocabulary=10)
    assert line in str(caught.value)


def without(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def with_column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.array(values, kind))

    return changed


def with_metadata(name: bytes, value: bytes) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(
        {**(table.schema.metadata or {}), name: value}
    )


BYTES, SHORTS, REALS = (pa.list_(kind) for kind in (pa.uint8(), pa.uint16(), pa.float32()))
DRAWN = {
    "teacher_top_logprobs": tuple(
        np.tile(np.log(np.array([0.5, 0.25, 0.25], np.float32)), (n, 1)) for n in LENGTHS
    ),
    "teacher_top_ids": tuple(np.tile([5, 6, 7], (n, 1)) for n in LENGTHS),
}


@pytest.mark.parametrize(
    ("codec", "change", "line"),
    [
        (ExactCodec(), without("teacher_tail_logprobs"), "no column teacher_tail_logprobs"),
        (
            ExactCodec(),
            with_column("teacher_logprobs", [[1], [], [2]], pa.list_(pa.int64())),
            "teacher_logprobs is list<item: int64>; expected list of float",
        ),
        (
            ExactCodec(),
            with_column("teacher_logprobs", [[-1, -1, -1], None, [-1, -1]], REALS),
            "row 1: teacher_logprobs is null",
        ),
        (
            ExactCodec(),
            with_column("teacher_logprobs", [[-1, None, -1], [], [-1, -1]], REALS),
            "teacher_logprobs is null",
        ),
        (
            ExactCodec(),
            with_column("teacher_logprobs", [[-1, -1, -1], [], [-1]], REALS),
            "row 2: teacher_logprobs has 1 entries; expected 2, by its tokens",
        ),
        (
            ExactCodec(),
            with_column("prompt_id", [1, 2, 3], pa.int64()),
            "column prompt_id is int64; expected string",
        ),
        (ExactCodec(), with_metadata(b"opd_stream", b"{"), "its codec cannot be read"),
        (
            CompactCodec(),
            with_column("top_counts", [[3, 3, 60_000], [], [3, 3]], SHORTS),
            "row 0: top_counts is 60000; expected at most 2048",
        ),
        (
            CompactCodec(),
            with_column("top_counts", [[3, 3, 2], [], [3, 3]], SHORTS),
            "row 0: top_codes_0 has 9 entries; expected 8, by its tokens",
        ),
        (
            CompactCodec(),
            with_column("top_codes_0", [[0] * 9, [], [0] * 5 + [9]], BYTES),
            "top_codes is 9; expected below 3",
        ),
        (
            CompactCodec(),
            with_column("top_codes_0", [[0] * 9, [], [0] * 6], BYTES),
            "row 0: teacher_top_ids is 5 at token 0; expected no candidate twice",
        ),
        (CompactCodec(), without("sampled_steps_0"), "there is no column sampled_steps_0"),
        (
            CompactCodec(),
            with_metadata(DICTIONARY_KEY, (2**40).to_bytes(8, "little") + b"abc"),
            "a dictionary of 11 bytes claims to hold 4,398,046,511,104; expected at most",
        ),
        (CompactCodec(), with_metadata(b"opd_stream", b'{"codec": {"kind": "compact", "mass": 7}}'),
         "its codec cannot be read"),
        (
            SampledCodec(draws=4),
            with_column("draw_counts_0", [[9] * 9, [], [2, 1, 1] * 2], BYTES),
            "row 0: teacher_top_logprobs is 0.81093 at token 0; expected at most 0",
        ),
    ],
)  # fmt: skip
def test_columns_that_are_none(codec: Codec, change: Any, line: str) -> None:
    drawn = DRAWN if isinstance(codec, SampledCodec) else {}
    table, _ = encode_scores(codec, scores(**drawn), rollouts())
    (batch,) = table.to_batches()
    assert checked_scores(batch, np.array(LENGTHS), vocabulary=10).teacher_logprobs.size == 5
    assert line in refusal(change(table).combine_chunks())


def test_a_shard_that_claims_a_gigabyte_is_not_expanded() -> None:
    table, _ = encode_scores(ExactCodec(), scores(), rollouts())
    data, parts = shard_bytes(table)
    message = pa.ipc.read_message(pa.py_buffer(data[parts[1].offset :]))
    body = parts[1].offset + parts[1].length - message.body.size
    start, _ = max(_buffers(bytes(message.metadata)), key=lambda each: each[1])
    claims = bytearray(data)
    claims[body + start : body + start + 8] = (1_200_000_000).to_bytes(8, "little")
    with pytest.raises(BrokenLaw, match=r"a record batch of .* bytes claims to hold 1,200,"):
        table_of(bytes(claims))


def test_a_line_of_a_packed_file_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b" " * 2**26))
    monkeypatch.setattr(lines, "MOST_CHARACTERS", 2**20)
    with pytest.raises(UserError, match=r"has a line of more than 1,048,576 characters"):
        list(lines.lines_of(path))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rows.jsonl.zst", b"\n" * 2**21, "has more than 1,048,576 empty lines"),
        ("rows.jsonl", b" \n" * 2**21, "has more than 1,048,576 empty lines"),
        ("rows.jsonl.zst", b"[" * 2**23, "holds more than 65,536 and 256 times that"),
        ("rows.jsonl.gz", b"[" * 2**23, "holds more than 65,536 and 256 times that"),
    ],
)
def test_a_file_that_keeps_a_reader_busy(
    name: str, text: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}
    path = tmp_path / name
    path.write_bytes(packed.get(path.suffix, bytes)(text))
    if "65,536" in line:
        monkeypatch.setattr(lines, "SMALLEST_BOUND", 2**16)
    with pytest.raises(UserError, match=line):
        list(lines.lines_of(path))


def test_a_parquet_file_of_one_value_is_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt_ids": [[1] * 100_000]}), path)
    monkeypatch.setattr(laws, "SMALLEST_BOUND", 0)
    with pytest.raises(UserError, match=r"prompt_ids.* claims to hold 400,000; expected at most"):
        import_scores(path, Store(tmp_path / "store"), ExactCodec())


def committed(folder: Path, table: pa.Table) -> str:
    """A store in which another program committed scores; their name."""
    store = Store(folder)
    texts = store.artifact(Recipe(kind="rollouts", settings={"by": "them"}, inputs={}))
    made = store.artifact(
        Recipe(kind="scores", settings={"by": "them"}, inputs={"rollouts": texts.fingerprint})
    )
    for artifact in (texts, made):
        artifact.create(rows=3, rows_per_unit=3)
    counts = {"rows": 3, "completion_tokens": 5}
    source = texts.commit(0, rollouts_table(rollouts()), counts=counts).sha256
    made.commit(0, table, counts=counts, source_sha256=source, skipped_rows=[1])
    for artifact in (texts, made):
        artifact.finish()
    return made.name


def test_a_unit_whose_digest_is_right_is_checked_when_it_is_first_read(tmp_path: Path) -> None:
    good, _ = encode_scores(ExactCodec(), scores(), rollouts())
    name = committed(tmp_path / "good", good)
    assert len(list(open_scores(f"{tmp_path}/good/{name}"))) == 2
    assert not list(damages(Store(tmp_path / "good"), deep=True))
    wrong = scores(**last("teacher_top_ids", (1, 1), 7))
    name = committed(tmp_path / "wrong", encode_scores(ExactCodec(), wrong, rollouts())[0])
    line = "row 2: teacher_top_ids is 7 at token 1; expected no candidate twice"
    with pytest.raises(DamagedUnit, match=f"unit 0 of {name} is damaged: {line}"):
        list(open_scores(f"{tmp_path}/wrong/{name}"))
    assert not list(damages(Store(tmp_path / "wrong")))
    (found,) = damages(Store(tmp_path / "wrong"), deep=True)
    assert (found.name, found.unit, found.reason) == (name, 0, line)


# Import

ROW: dict[str, Any] = {
    "prompt_id": "p",
    "sample_index": 0,
    "prompt_ids": [2, 3],
    "completion_ids": [4, 5],
    "behavior_logprobs": [-0.5, -0.25],
    "finish_reason": "stop",
    "teacher_logprobs": [-0.5, -2.0],
    "teacher_top_ids": [[4, 9], [7]],
    "teacher_top_logprobs": [[-0.5, -1.5], [-0.25]],
    "teacher_tail_logprobs": [-1.75, -1.5],
    "teacher_forced_logprobs": [[-3.0], [-4.0]],
    "refused": None,
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"completion_ids": [4, 100]}, "completion_ids is 100 at token 1; expected 0 to 99"),
        ({"behavior_logprobs": [-0.5, 0.25]}, "behavior_logprobs is 0.25 at token 1; expected a"),
        ({"teacher_top_ids": [[4, 4], [7]]}, "teacher_top_ids is 4 at token 0; expected no cand"),
        ({"teacher_top_ids": [[4, -9], [7]]}, "teacher_top_ids[0][1] is -9; mend the row"),
        ({"teacher_top_logprobs": [[-0.1, -0.1], [0]]}, "mass, with the tail) is 1.9"),
        ({"finish_reason": "eos"}, "finish_reason is 'eos'; mend the row"),
        ({"sample_index": 2**40}, "sample_index is 1099511627776; mend the row"),
        ({"prompt_ids": []}, "prompt_ids is empty; expected at least one token"),
        ({"prompt_ids": [True, 3]}, "prompt_ids[0] is True; mend the row"),
        ({"completion_ids": ["4", 5]}, "completion_ids[0] is '4'; mend the row"),
        ({"prompt_ids": [2.0, 3]}, "prompt_ids[0] is 2.0; mend the row"),
        ({"sample_index": "7"}, "sample_index is '7'; mend the row"),
        ({"sample_index": False}, "sample_index is False; mend the row"),
        ({"prompt_id": True}, "prompt_id[str] is True; mend the row"),
        ({"prompt_id": float("nan")}, "prompt_id[str] is nan; mend the row"),
        ({"prompt_id": "\ud800"}, "cannot be stored: 'utf-8' codec can't encode character"),
        ({"behavior_logprobs": ["-0.5", -0.25]}, "behavior_logprobs[0] is '-0.5'; mend the row"),
        ({"sample_index": 5}, "has prompt_id 'p' and sample_index 5, as a row before it"),
        ({"teacher_logprobs": [-1.0, -2.0]}, "teacher_logprobs is -1 at token 0; expected that of"),
        ({"teacher_logprobs": [-0.5, -0.1]}, "teacher_logprobs is -0.1 at token 1; expected that"),
        ({"teacher_forced_logprobs": [[-3.0], [-0.1]]}, "forced_logprobs is -0.1 at token 1; e"),
        ({"teacher_forced_logprobs": [[-1e39], [-4.0]]}, "has -1e+39 in teacher_forced_logprobs"),
        ({"teacher_top_logprobs": [[-0.5, -1e39], [-0.25]]}, "has -1e+39 in teacher_top_logprobs"),
        ({"teacher_top_ids": [[4, 9], []], "teacher_top_logprobs": [[-0.5, -1.5], []],
          "teacher_tail_logprobs": [-1.75, 0]}, "number of teacher_top_ids is 0 at token 1"),
        ({"teacher_top_logprobs": [[-3, -4], [-0.25]]}, "mass, with the tail) is 0.241877 at"),
    ],
)  # fmt: skip
def test_a_row_that_no_reader_takes_is_named_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{**ROW, "sample_index": row} for row in range(600)]
    rows.append({**ROW, "sample_index": 600, **changes})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        import_scores(source, Store(tmp_path / "store"), ExactCodec(), stop_ids=[8], vocabulary=100)
    assert f"{source} line {513 if 'stored' in line else 601}" in str(caught.value)
    assert line in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({**ROW, "teacher_forced_logprobs": [[-1e30], [-4]]}))
    with pytest.raises(UserError, match=r"line 1 and after cannot be stored: .* is below -4091"):
        import_scores(source, Store(tmp_path / "store"), CompactCodec())
    assert not (tmp_path / "store").exists()
    made = import_scores(source, Store(tmp_path / "store"), ExactCodec())
    row = open_scores(f"{tmp_path}/store/{made.name}")[0]
    assert row.teacher_forced_logprobs.tolist() == [[-np.inf], [-4]]  # of no probability


def test_a_key_or_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW)[:-1] + ', "prompt_ids": [9]}')
    with pytest.raises(UserError, match=r"line 1 is not JSON \(the key 'prompt_ids' stands twice"):
        import_scores(source, Store(tmp_path / "store"), ExactCodec())
    table = pa.Table.from_pylist([ROW])
    twice = pa.table([*table.columns, table["prompt_ids"]], [*table.column_names, "prompt_ids"])
    pq.write_table(twice, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="two columns 'prompt_ids'"):
        import_scores(tmp_path / "rows.parquet", Store(tmp_path / "store"), ExactCodec())


def test_a_parquet_column_that_python_cannot_hold(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([ROW]).append_column("far", pa.array([2**62], pa.duration("s")))
    pq.write_table(table, path)
    with pytest.raises(UserError, match=r"is not a whole Parquet file \(.* too large"):
        list(parquet_rows(path))
    import_scores(path, Store(tmp_path / "store"), ExactCodec())  # which does not read it
    lengths = pa.array(["abc"]).buffers()[1]
    latin = pa.StringArray.from_buffers(1, lengths, pa.py_buffer(b"\xff\xfe\xfd"))
    pq.write_table(pa.table({"prompt": latin}), path)
    with pytest.raises(UserError, match=r"is not a whole Parquet file .*can't decode"):
        list(parquet_rows(path))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 12),
    st.floats(),
    st.floats(-5, 0.5),
    st.text(max_size=3),
    st.lists(st.integers(-1, 9), max_size=3),
    st.just({}),
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The row with some values, items or columns changed, left out, doubled or exchanged."""
    row: dict[str, Any] = json.loads(json.dumps(ROW))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(ROW)))
        here, key = row, name
        while isinstance(here.get(key) if isinstance(here, dict) else here[key], list):  # type: ignore[index]
            inner: Any = here[key]  # type: ignore[index]
            if not inner or draw(st.booleans()):
                break
            here, key = inner, draw(st.integers(0, len(inner) - 1))  # type: ignore[assignment]
        change = draw(st.sampled_from(["replace", "remove", "double"]))
        if change == "remove":
            if isinstance(here, list) or key in here:
                del here[key]
        elif change == "double" and isinstance(here, list):
            here.append(here[key])
        else:
            here[key] = draw(ODD)
    return row


def border(row: dict[str, Any], codec: Codec) -> None:
    """A row is refused in one line, or read again."""
    folder = Path(tempfile.mkdtemp(prefix="border-"))
    try:
        source = folder / "rows.jsonl"
        rows = (row, {**ROW, "prompt_id": "another"})
        source.write_text("".join(json.dumps(each) + "\n" for each in rows))
        store = Store(folder / "store")
        made = refused = None
        try:
            made = import_scores(source, store, codec)
        except UserError as error:
            refused = str(error)
        event("refused" if made is None else "accepted")
        if refused is not None or made is None:
            assert "\n" not in str(refused)
            assert str(source) in str(refused)
            assert not (folder / "store").exists()
            return
        assert not list(damages(store, deep=True))
        assert len(list(open_scores(f"{folder}/store/{made.name}"))) >= 1
    finally:
        shutil.rmtree(folder)


CODECS = st.sampled_from([ExactCodec(), ExactCodec(dtype="float32"), CompactCodec()])


@given(row=mutated(), codec=CODECS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_row_is_refused_in_one_line_or_read(row: dict[str, Any], codec: Codec) -> None:
    border(row, codec)


@pytest.mark.slow
@given(row=mutated(), codec=CODECS)
@settings(max_examples=10_000, suppress_health_check=[HealthCheck.too_slow])
def test_ten_thousand_mutated_rows(row: dict[str, Any], codec: Codec) -> None:
    border(row, codec)
