"""Teacher caches of other programs, in and out: Parquet, `datasets` folders and JSON lines.

One row is one scored rollout, with the columns below; docs/cache-format.md describes them. A file
that was exported and imported again holds the same values.
"""

import importlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from opd_stream.errors import UserError, shortened
from opd_stream.section import Record
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import Codec, HiddenCodec, decode_scores, encode_scores
from opd_stream.store.codecs.columns import block_of
from opd_stream.store.codecs.laws import (
    MOST_CANDIDATES,
    BrokenLaw,
    check_expansion,
    check_rollouts,
    check_scores,
)
from opd_stream.store.files import sha256_file
from opd_stream.store.lines import lines_of
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_table
from opd_stream.store.store import Store
from opd_stream.types import FinishReason, RolloutBatch, ScoreBatch

ROWS_PER_UNIT = 512
LISTS = pa.list_(pa.float32())
COLUMNS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.uint32())),
        ("completion_ids", pa.list_(pa.uint32())),
        ("behavior_logprobs", LISTS),
        ("finish_reason", pa.string()),
        ("teacher_logprobs", LISTS),
        ("teacher_top_ids", pa.list_(pa.list_(pa.uint32()))),
        ("teacher_top_logprobs", pa.list_(LISTS)),
        ("teacher_tail_logprobs", LISTS),
        ("teacher_forced_logprobs", pa.list_(LISTS)),
        ("refused", pa.string()),
    ]
)
PlacedRow = tuple[str, object]  # where a row stands, and its JSON value
UnitReport = Callable[[int, int, int], object]  # units done, of how many, tokens of the latest


TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Logprob = Annotated[float, Field(lt=math.inf)]
Candidates = Annotated[list[Logprob], Field(max_length=MOST_CANDIDATES)]


class ImportedRow(Record):
    """A row that another program wrote; lists of a refused row's scores are empty."""

    prompt_id: str | int | float | None = None
    sample_index: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    prompt_ids: list[TokenId]
    completion_ids: list[TokenId]
    behavior_logprobs: list[Logprob]
    finish_reason: FinishReason | None = None
    teacher_logprobs: list[Logprob]
    teacher_top_ids: list[list[TokenId]]
    teacher_top_logprobs: list[Candidates]
    teacher_tail_logprobs: list[Logprob] | None = None
    teacher_forced_logprobs: list[Candidates] | None = None
    refused: str | None = None


def _silent(done: int, total: int, tokens: int) -> None:
    pass


def export_scores(
    store: Store, scores: Artifact, out: Path, *, form: str, after_unit: UnitReport = _silent
) -> int:
    """Write a scores artifact with its rollouts as Parquet files or a `datasets` folder.

    Args:
        store: where both lie.
        scores: a complete scores artifact.
        out: folder that must not exist yet.
        form: `parquet` or `datasets`.
        after_unit: called before the first unit and after each.

    Returns:
        Rows written.

    Raises:
        UserError: the folder exists, or the artifact is not complete.
        DamagedUnit: a shard is not what was committed.
    """
    if out.exists():
        raise UserError(f"{out} exists; expected a new folder; choose another or remove it")
    rollouts = store.scored_rollouts(scores)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, commits = 0, scores.listed_commits()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "parquet"
        folder.mkdir()
        after_unit(0, len(commits), 0)
        for done, (unit, commit) in enumerate(commits.items(), 1):
            table = _plain(rollouts.read_unit(unit), scores.read_unit(unit))
            pq.write_table(table, folder / f"{unit:05d}.parquet", compression="zstd")
            rows += table.num_rows
            after_unit(done, len(commits), int(commit.counts.get("completion_tokens", 0)))
        if form == "datasets":
            datasets: Any = importlib.import_module("datasets")  # not typed
            datasets.disable_progress_bars()
            files = [str(path) for path in sorted(folder.iterdir())]
            loaded = datasets.Dataset.from_parquet(files, cache_dir=f"{temporary}/cache")
            folder = Path(temporary) / "datasets"
            loaded.save_to_disk(folder)
        shutil.move(folder, out)
    return rows


def import_scores(
    source: Path,
    store: Store,
    codec: Codec,
    *,
    stop_ids: Sequence[int] = (),
    vocabulary: int | None = None,
    after_unit: UnitReport = _silent,
) -> Artifact:
    """Make rollouts and scores artifacts of a JSONL(.zst) or Parquet file, or a folder of Parquet.

    `stop_ids` are the terminators that the first columns of teacher_forced_logprobs speak of, ids
    are below `vocabulary` (None: it is not known), and `after_unit` is called before the first unit
    and after each. Every row is checked before anything is written.

    Raises:
        UserError: a row is missing a column, its lengths do not agree, or it holds values that no
            reader takes (file, row, column and value named).
    """
    if isinstance(codec, HiddenCodec):
        raise UserError(
            "codec hidden stores a teacher's hidden states, which files of scores do not hold; "
            "expected --codec {kind: exact} or {kind: compact}"
        )
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{source} is no file and no folder of Parquet files; expected .jsonl, .jsonl.zst or "
            ".parquet; check the path"
        )
    digests = [sha256_file(file) for file in files]
    ids = list(stop_ids)
    rows = 0
    for chunk in _chunks(files):
        _checked_batches(chunk, len(ids), vocabulary)
        rows += len(chunk)
    if rows == 0:
        raise UserError(f"{source} holds no rows; expected one scored rollout a row")
    settings = {"imported": digests, **({"stop_ids": ids} if ids else {})}
    rollouts = store.artifact(Recipe(kind="rollouts", settings=settings, inputs={}))
    settings = {"imported": digests, "codec": codec.model_dump(), "forced_ids": ids}
    inputs = {"rollouts": rollouts.fingerprint}
    scores = store.artifact(Recipe(kind="scores", settings=settings, inputs=inputs))
    for artifact in (rollouts, scores):
        artifact.create(rows=rows, rows_per_unit=ROWS_PER_UNIT)
    units = scores.units()
    after_unit(0, len(units), 0)
    for unit, chunk in zip(units, _chunks(files), strict=True):
        tokens = _import_unit((rollouts, scores), unit, chunk, codec, len(ids))
        after_unit(unit + 1, len(units), tokens)
    for artifact in (rollouts, scores):
        artifact.finish()
    return scores


def _import_unit(
    artifacts: tuple[Artifact, Artifact],
    unit: int,
    chunk: list[PlacedRow],
    codec: Codec,
    forced: int,
) -> int:
    """Commit rows as a unit of (rollouts, scores); returns their completion tokens."""
    rollouts, scores = artifacts
    batch, scored = _checked_batches(chunk, forced, None)
    try:
        table, fidelity = encode_scores(codec, scored, batch)
    except ValueError as error:
        raise UserError(f"rows of {chunk[0][0]} and after cannot be stored: {error}") from error
    counts = {"rows": len(batch), "completion_tokens": batch.completion_tokens}
    record = rollouts.commit(unit, rollouts_table(batch), counts=counts)
    empty = [row for row, ids in enumerate(batch.completion_ids) if not len(ids)]
    scores.commit(
        unit,
        table,
        counts=counts,
        source_sha256=record.sha256,
        skipped_rows=sorted({*empty, *scored.refused}),
        fidelity=fidelity,
    )
    return batch.completion_tokens


def _chunks(files: Sequence[Path]) -> Iterator[list[PlacedRow]]:
    """The rows of all files, a unit at a time."""
    every_row = (item for file in files for item in _rows_of(file))
    while chunk := list(islice(every_row, ROWS_PER_UNIT)):
        yield chunk


def _checked_batches(
    chunk: list[PlacedRow], forced: int, vocabulary: int | None
) -> tuple[RolloutBatch, ScoreBatch]:
    """Rows as batches that obey every law of `codecs.laws`, with at least so many forced ids."""
    batch, scored = _batches(chunk)
    if any(row.shape[1] < forced for row in scored.teacher_forced_logprobs if len(row)):
        raise UserError(
            f"{chunk[0][0]} has fewer teacher_forced_logprobs than the {forced} "
            "terminators named; add their log-probabilities, or name no terminators"
        )
    try:
        check_rollouts(batch, vocabulary=vocabulary)
        check_scores(block_of(scored), is_ranked=True, vocabulary=vocabulary)
    except BrokenLaw as error:
        place = chunk[error.row or 0][0]
        raise UserError(f"{place}: {error.text}; mend the row") from error
    return batch, scored


def _plain(rollouts: pa.Table, scores: pa.Table) -> pa.Table:
    """Both shards of a unit with one plain list a value."""
    parts: list[pa.Table] = []
    for batch in scores.to_batches():
        block = decode_scores(batch)
        offsets = pa.array(block.offsets.astype(np.int32))
        present = np.isfinite(block.teacher_top_logprobs)
        counts = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)

        def nested(values: NDArray[Any], starts: NDArray[Any], offsets: pa.Array = offsets) -> Any:
            inner = pa.ListArray.from_arrays(pa.array(starts), pa.array(values))
            return pa.ListArray.from_arrays(offsets, inner)

        forced = block.teacher_forced_logprobs
        forced_starts = (np.arange(len(forced) + 1) * forced.shape[1]).astype(np.int32)
        columns = {
            "teacher_logprobs": pa.ListArray.from_arrays(offsets, pa.array(block.teacher_logprobs)),
            "teacher_top_ids": nested(block.teacher_top_ids[present], counts),
            "teacher_top_logprobs": nested(block.teacher_top_logprobs[present], counts),
            "teacher_tail_logprobs": pa.ListArray.from_arrays(
                offsets, pa.array(block.teacher_tail_logprobs)
            ),
            "teacher_forced_logprobs": nested(forced.reshape(-1), forced_starts),
            "refused": pa.array(block.refused, pa.string()),
        }
        parts.append(pa.table(columns))
    joined = pa.concat_tables(parts) if parts else None
    keys = [name for name in COLUMNS.names if name in rollouts.column_names]
    table = rollouts.select(keys)
    for name in COLUMNS.names[len(keys) :]:
        column = pa.array([], COLUMNS.field(name).type) if joined is None else joined[name]
        table = table.append_column(name, column)
    return table.cast(COLUMNS)


def _rows_of(file: Path) -> Iterator[PlacedRow]:
    """The rows of a file, as they are."""
    if file.suffix == ".parquet":
        number = 0
        for batch in _parquet_batches(file):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
        return
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number} is not JSON ({error}); mend it") from error
        yield f"{file} line {number}", row


def _parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, as far as its own sizes allow."""
    try:
        opened: Any = pq.ParquetFile(file)  # not typed as a whole
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            columns = [group.column(each) for each in range(group.num_columns)]
            for column in columns:
                claimed = max(column.total_uncompressed_size, 4 * column.num_values)
                check_expansion(column.total_compressed_size, claimed, column.path_in_schema)
        yield from opened.iter_batches(256)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} cannot be read ({reason}); expected a Parquet file; copy it again"
        ) from error


def _checked(place: str, value: object) -> ImportedRow:
    """A row whose columns are there and agree.

    Raises:
        UserError: names the place.
    """
    try:
        row = ImportedRow.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "values"
        if first["type"] == "missing" or (len(first["loc"]) == 1 and first["input"] is None):
            raise UserError(
                f"{place} has no {name}; expected the columns of docs/cache-format.md; add it"
            ) from error
        kind = f"such ({first['msg']})"
        if "logprobs" in name:
            kind = "log-probabilities (null, NaN or infinite)"
        where = "".join(f"[{part}]" for part in first["loc"][1:])
        raise UserError(
            f"{place} has {name} that are no {kind}: {name}{where} is {shortened(first['input'])}; "
            "mend the row"
        ) from error
    tokens = len(row.completion_ids)
    scored = 0 if row.refused else tokens
    for name, values, wanted in (
        ("behavior_logprobs", row.behavior_logprobs, tokens),
        ("teacher_logprobs", row.teacher_logprobs, scored),
        ("teacher_top_ids", row.teacher_top_ids, scored),
        ("teacher_top_logprobs", row.teacher_top_logprobs, scored),
        ("teacher_tail_logprobs", row.teacher_tail_logprobs, scored),
        ("teacher_forced_logprobs", row.teacher_forced_logprobs, scored),
    ):
        if values is not None and len(values) != wanted:
            what = "completion" if values is row.behavior_logprobs else "scored"
            raise UserError(
                f"{place} has {len(values)} {name} for {wanted} {what} tokens; expected one for "
                "each; mend the row"
            )
    if len({len(values) for values in row.teacher_forced_logprobs or ()}) > 1:
        raise UserError(
            f"{place} has unequal numbers of teacher_forced_logprobs at its positions; "
            "expected one for each forced id everywhere; mend the row"
        )
    for ids, logprobs in zip(row.teacher_top_ids, row.teacher_top_logprobs, strict=True):
        if len(ids) != len(logprobs):
            raise UserError(
                f"{place} has {len(ids)} teacher_top_ids and {len(logprobs)} teacher_top_logprobs "
                "at a position; expected as many of one as of the other; mend the row"
            )
    return row


def _batches(chunk: list[PlacedRow]) -> tuple[RolloutBatch, ScoreBatch]:
    rows = [_checked(place, value) for place, value in chunk]
    most = max((len(ids) for row in rows for ids in row.teacher_top_ids), default=0)
    tops = [_ranked(row, most) for row in rows]
    forced = [row.teacher_forced_logprobs or [[] for _ in row.teacher_logprobs] for row in rows]
    widths = {len(values[0]) for values in forced if values}
    if len(widths) > 1:
        raise UserError(
            f"rows of {chunk[0][0]} and after have {sorted(widths)} teacher_forced_logprobs a "
            "token; expected as many in every row; mend the rows"
        )

    def arrays(column: Iterable[Any], dtype: Any) -> tuple[NDArray[Any], ...]:
        return tuple(np.array(values, dtype) for values in column)

    rollouts = RolloutBatch(
        prompt_id=tuple(
            place if row.prompt_id is None else str(row.prompt_id)
            for (place, _), row in zip(chunk, rows, strict=True)
        ),
        sample_index=np.array([row.sample_index or 0 for row in rows], np.int32),
        prompt_ids=arrays((row.prompt_ids for row in rows), np.int64),
        completion_ids=arrays((row.completion_ids for row in rows), np.int64),
        behavior_logprobs=arrays((row.behavior_logprobs for row in rows), np.float32),
        finish_reason=tuple(row.finish_reason or "length" for row in rows),
    )
    return rollouts, ScoreBatch(
        teacher_logprobs=arrays((row.teacher_logprobs for row in rows), np.float32),
        teacher_top_ids=tuple(ids for ids, _ in tops),
        teacher_top_logprobs=tuple(logprobs for _, logprobs in tops),
        teacher_tail_logprobs=tuple(
            _tail_of(top)
            if row.teacher_tail_logprobs is None
            else np.array(row.teacher_tail_logprobs, np.float32)
            for row, (_, top) in zip(rows, tops, strict=True)
        ),
        teacher_forced_logprobs=tuple(
            np.array(values, np.float32).reshape(len(values), max(widths, default=0))
            for values in forced
        ),
        refused={n: row.refused for n, row in enumerate(rows) if row.refused},
    )


def _ranked(row: ImportedRow, most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Candidates in rank order, filled up to `most` with id 0 and -inf [T, K]."""
    length = len(row.teacher_top_ids)
    ids = np.zeros((length, most), np.int64)
    logprobs = np.full((length, most), -np.inf, np.float32)
    for place in range(length):
        values = np.array(row.teacher_top_logprobs[place], np.float32)
        order = np.argsort(-values, kind="stable")
        logprobs[place, : len(values)] = values[order]
        ids[place, : len(values)] = np.array(row.teacher_top_ids[place], np.int64)[order]
    return ids, logprobs


def _tail_of(logprobs_TK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of what the candidates leave; below 1e-7 that is rounding of theirs."""
    rest = 1 - np.exp(logprobs_TK.astype(np.float64)).sum(1)
    return np.log(rest.clip(1e-7)).astype(np.float32)
