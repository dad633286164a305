"""Teacher caches of other programs, in and out: Parquet, `datasets` folders and JSON lines.

One row is one scored rollout, with the columns below; docs/cache-format.md describes them. A file
that was exported and imported again holds the same values.
"""

import importlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from opd_stream.errors import UserError, shortened
from opd_stream.section import Record
from opd_stream.store.artifact import Artifact, check_source
from opd_stream.store.codecs import (
    Codec,
    HiddenCodec,
    SampledCodec,
    decode_scores,
    encode_scores,
)
from opd_stream.store.codecs.columns import ScoreBlock, block_of
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.codecs.laws import (
    MOST_CANDIDATES,
    BrokenLaw,
    check_agreement,
    check_rollouts,
    check_scores,
)
from opd_stream.store.files import sha256_file
from opd_stream.store.lines import lines_of, parse_json
from opd_stream.store.parquet import parquet_rows
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_table
from opd_stream.store.store import Store
from opd_stream.types import FinishReason, RolloutBatch, ScoreBatch

ROWS_PER_UNIT = 512
LOWEST = float(np.finfo(np.float32).min)
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
Logprob = Annotated[float, Field(le=-LOWEST)]
Candidates = Annotated[list[Logprob], Field(max_length=MOST_CANDIDATES)]


class ImportedRow(Record):
    """A row that another program wrote; lists of a refused row's scores are empty.

    Nothing is converted: neither text nor `true` is a number, and 4.0 is no id.
    """

    model_config = ConfigDict(strict=True)

    prompt_id: str | int | Annotated[float, Field(allow_inf_nan=False)] | None = None
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
            check_source(scores, commit, rollouts.commit_record(unit))
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
    rows, keys = 0, set[tuple[str, int]]()
    for chunk in _chunks(files):
        _encoded(chunk, codec, ids, vocabulary, keys)
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
        tokens = _import_unit((rollouts, scores), unit, chunk, codec, ids)
        after_unit(unit + 1, len(units), tokens)
    for artifact in (rollouts, scores):
        artifact.finish()
    return scores


def _import_unit(
    artifacts: tuple[Artifact, Artifact],
    unit: int,
    chunk: list[PlacedRow],
    codec: Codec,
    stop_ids: Sequence[int],
) -> int:
    """Commit rows as a unit of (rollouts, scores); returns their completion tokens."""
    rollouts, scores = artifacts
    batch, scored, table, fidelity = _encoded(chunk, codec, stop_ids, None, set())
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


def _encoded(
    chunk: list[PlacedRow],
    codec: Codec,
    stop_ids: Sequence[int],
    vocabulary: int | None,
    keys: set[tuple[str, int]],
) -> tuple[RolloutBatch, ScoreBatch, pa.Table, Fidelity]:
    """Rows that obey every law of `codecs.laws`, and the scores as the codec stores them.

    `keys` are of the rows before, and theirs are added.
    """
    batch, scored = _batches(chunk)
    if any(row.shape[1] < len(stop_ids) for row in scored.teacher_forced_logprobs if len(row)):
        raise UserError(
            f"{chunk[0][0]} has fewer teacher_forced_logprobs than the {len(stop_ids)} "
            "terminators named; add their log-probabilities, or name no terminators"
        )
    for row, key in enumerate(zip(batch.prompt_id, batch.sample_index.tolist(), strict=True)):
        if key in keys:
            raise UserError(
                f"{chunk[row][0]} has prompt_id {shortened(key[0])} and sample_index {key[1]}, as "
                "a row before it; expected each pair once; number the samples of a prompt"
            )
        keys.add(key)
    try:
        check_rollouts(batch, vocabulary=vocabulary)
        block = block_of(scored)
        check_scores(block, is_ranked=True, vocabulary=vocabulary)
        if not isinstance(codec, SampledCodec):
            _check_agreement(batch, scored, block, stop_ids)
    except BrokenLaw as error:
        place = chunk[error.row or 0][0]
        raise UserError(f"{place}: {error.text}; mend the row") from error
    try:
        table, fidelity = encode_scores(codec, scored, batch)
    except ValueError as error:
        raise UserError(f"rows of {chunk[0][0]} and after cannot be stored: {error}") from error
    return batch, scored, table, fidelity


def _check_agreement(
    batch: RolloutBatch, scored: ScoreBatch, block: ScoreBlock, stop_ids: Sequence[int]
) -> None:
    """What is said twice of a drawn token, or of a terminator, has to be the same."""
    read = [ids for row, ids in enumerate(batch.completion_ids) if row not in scored.refused]
    tokens = len(block.teacher_logprobs)
    if not tokens:
        return
    check_agreement(
        block, np.concatenate(read).astype(np.int64), block.teacher_logprobs, "teacher_logprobs"
    )
    for place, stop_id in enumerate(stop_ids):
        forced = block.teacher_forced_logprobs[:, place]
        check_agreement(block, np.full(tokens, stop_id), forced, "teacher_forced_logprobs")


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
        for number, row in enumerate(parquet_rows(file, COLUMNS.names), 1):
            yield f"{file} row {number}", row
        return
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number} is not JSON ({error}); mend it") from error
        yield f"{file} line {number}", row


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
    for name, values in _logprobs(row):
        lowest = min((value for value in values if value > -math.inf), default=0.0)
        if lowest < LOWEST:
            raise UserError(
                f"{place} has {lowest:g} in {name}; expected {LOWEST:g} or more, the lowest of a "
                "float32, or -Infinity; mend the row"
            )
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


def _logprobs(row: ImportedRow) -> Iterator[tuple[str, Iterable[float]]]:
    """The log-probabilities of a row, by column."""
    yield "behavior_logprobs", row.behavior_logprobs
    yield "teacher_logprobs", row.teacher_logprobs
    yield "teacher_tail_logprobs", row.teacher_tail_logprobs or ()
    yield "teacher_top_logprobs", chain.from_iterable(row.teacher_top_logprobs)
    yield "teacher_forced_logprobs", chain.from_iterable(row.teacher_forced_logprobs or ())


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
