"""Teacher caches of other programs, in and out: Parquet, `datasets` folders and JSON lines.

One row is one scored rollout, with the columns below; docs/cache-format.md describes them. A file
that was exported and imported again holds the same values.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, Commit
from opd_stream.store.codecs import Codec, decode_scores, encode_scores
from opd_stream.store.files import lines_of, sha256_file
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_table
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch, ScoreBatch

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
Told = Callable[[Artifact, Commit | None], object]  # None: before the first unit


def export_scores(
    store: Store,
    scores: Artifact,
    out: Path,
    *,
    form: str,
    told: Told = lambda artifact, commit: None,
) -> int:
    """Write a scores artifact with its rollouts as Parquet files or a `datasets` folder.

    Args:
        store: where both lie.
        scores: a complete scores artifact.
        out: folder that must not exist yet.
        form: `parquet` or `datasets`.
        told: called before the first unit and after each.

    Returns:
        Rows written.

    Raises:
        UserError: the folder exists, or the artifact is not complete.
        DamagedUnit: a shard is not what was committed.
    """
    if out.exists():
        raise UserError(f"{out} exists; expected a new folder; choose another or remove it")
    if not scores.is_complete():
        raise UserError(f"{scores.name} is not complete; run its score stage again")
    rollouts = store.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"])
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "parquet"
        folder.mkdir()
        told(scores, None)
        for unit, commit in scores.listed_commits().items():
            table = _plain(rollouts.read_unit(unit), scores.read_unit(unit))
            pq.write_table(table, folder / f"{unit:05d}.parquet", compression="zstd")
            rows += table.num_rows
            told(scores, commit)
        if form == "datasets":
            import datasets

            datasets.disable_progress_bars()
            files: list[Any] = [str(path) for path in sorted(folder.iterdir())]
            loaded = datasets.Dataset.from_parquet(files, cache_dir=f"{temporary}/cache")
            folder = Path(temporary) / "datasets"
            loaded.save_to_disk(folder)  # pyright: ignore[reportAttributeAccessIssue]
        shutil.move(folder, out)
    return rows


def import_scores(
    source: Path,
    store: Store,
    codec: Codec,
    *,
    stop_ids: Sequence[int] = (),
    told: Told = lambda artifact, commit: None,
) -> Artifact:
    """Make rollouts and scores artifacts of a JSONL(.zst) or Parquet file, or a folder of Parquet.

    `stop_ids` are the terminators that the first columns of teacher_forced_logprobs speak of;
    `told` is called before the first unit and after each.

    Raises:
        UserError: a row is missing a column, or its lengths do not agree (file and row named).
    """
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{source} is no file and no folder of Parquet files; expected .jsonl, .jsonl.zst or "
            ".parquet; check the path"
        )
    digests = [sha256_file(file) for file in files]
    rows = sum(1 for file in files for _ in _rows_of(file))
    if rows == 0:
        raise UserError(f"{source} holds no rows; expected one scored rollout a row")
    stops = {"stop_ids": list(stop_ids)} if stop_ids else {}
    rollouts = store.artifact(
        Recipe(kind="rollouts", settings={"imported": digests, **stops}, inputs={})
    )
    scores = store.artifact(
        Recipe(
            kind="scores",
            settings={
                "imported": digests,
                "codec": codec.model_dump(),
                "forced_ids": list(stop_ids),
            },
            inputs={"rollouts": rollouts.fingerprint},
        )
    )
    for artifact in (rollouts, scores):
        artifact.create(rows=rows, rows_per_unit=ROWS_PER_UNIT)
    everything = (item for file in files for item in _rows_of(file))
    told(scores, None)
    for unit in scores.units():
        chunk = list(islice(everything, ROWS_PER_UNIT))
        batch, scored = _batches(chunk)
        if any(row.shape[1] < len(stop_ids) for row in scored.teacher_forced_logprobs if len(row)):
            raise UserError(
                f"{chunk[0][0]} has fewer teacher_forced_logprobs than the {len(stop_ids)} "
                "terminators named; add their log-probabilities, or name no terminators"
            )
        try:
            table, fidelity = encode_scores(codec, scored, batch)
        except ValueError as error:
            raise UserError(f"rows of {chunk[0][0]} and after cannot be stored: {error}") from error
        tokens = batch.completion_tokens
        counts = {"rows": len(batch), "completion_tokens": tokens}
        record = rollouts.commit(unit, rollouts_table(batch), counts=counts)
        skipped = [row for row, ids in enumerate(batch.completion_ids) if not len(ids)]
        scored_as = scores.commit(
            unit,
            table,
            counts=counts,
            source_sha256=record.sha256,
            skipped_rows=sorted({*skipped, *scored.refused}),
            fidelity=fidelity,
        )
        told(scores, scored_as)
    for artifact in (rollouts, scores):
        artifact.finish()
    return scores


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


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a file."""
    if file.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
        return
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file} line {number} is not JSON ({error}); mend it") from error
        yield f"{file} line {number}", row


def _batches(chunk: list[tuple[str, dict[str, Any]]]) -> tuple[RolloutBatch, ScoreBatch]:
    for place, row in chunk:
        check_row(place, row)
    rows = [row for _, row in chunk]
    refused = {n: row["refused"] for n, row in enumerate(rows) if row.get("refused")}
    lengths = [0 if n in refused else len(row["completion_ids"]) for n, row in enumerate(rows)]
    most = max(
        (len(ids) for row in rows for ids in row["teacher_top_ids"] or []),
        default=0,
    )

    def flat(name: str, dtype: Any) -> tuple[NDArray[Any], ...]:
        return tuple(np.array(row[name] or [], dtype) for row in rows)

    tops = [_ranked(row, length, most) for row, length in zip(rows, lengths, strict=True)]
    tails = tuple(
        np.array(row["teacher_tail_logprobs"], np.float32)
        if row.get("teacher_tail_logprobs") is not None
        else _tail_of(top)
        for row, (_, top) in zip(rows, tops, strict=True)
    )
    widths = {
        len((row.get("teacher_forced_logprobs") or [()])[0])
        for row, length in zip(rows, lengths, strict=True)
        if length
    }
    if len(widths) > 1:
        raise UserError(
            f"rows of {chunk[0][0]} and after have {sorted(widths)} teacher_forced_logprobs a "
            "token; expected as many in every row; mend the rows"
        )
    forced = max(widths, default=0)
    rollouts = RolloutBatch(
        prompt_id=tuple(str(row.get("prompt_id", place)) for place, row in chunk),
        sample_index=np.array([row.get("sample_index") or 0 for row in rows], np.int32),
        prompt_ids=flat("prompt_ids", np.int64),
        completion_ids=flat("completion_ids", np.int64),
        behavior_logprobs=flat("behavior_logprobs", np.float32),
        finish_reason=tuple(row.get("finish_reason") or "length" for row in rows),
    )
    return rollouts, ScoreBatch(
        teacher_logprobs=flat("teacher_logprobs", np.float32),
        teacher_top_ids=tuple(ids for ids, _ in tops),
        teacher_top_logprobs=tuple(logprobs for _, logprobs in tops),
        teacher_tail_logprobs=tails,
        teacher_forced_logprobs=tuple(
            np.array(row.get("teacher_forced_logprobs") or [], np.float32).reshape(length, forced)
            for row, length in zip(rows, lengths, strict=True)
        ),
        refused=refused,
    )


def _ranked(
    row: dict[str, Any], length: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Candidates in rank order, filled up to `most` with id 0 and -inf [T, K]."""
    ids = np.zeros((length, most), np.int64)
    logprobs = np.full((length, most), -np.inf, np.float32)
    for place in range(length):
        values = np.array(row["teacher_top_logprobs"][place], np.float32)
        order = np.argsort(-values, kind="stable")
        logprobs[place, : len(values)] = values[order]
        ids[place, : len(values)] = np.array(row["teacher_top_ids"][place], np.int64)[order]
    return ids, logprobs


def _tail_of(logprobs_TK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of what the candidates leave; below 1e-7 that is rounding of theirs."""
    rest = 1 - np.exp(logprobs_TK.astype(np.float64)).sum(1)
    return np.log(rest.clip(1e-7)).astype(np.float32)


REQUIRED = (
    "prompt_ids",
    "completion_ids",
    "behavior_logprobs",
    "teacher_logprobs",
    "teacher_top_ids",
    "teacher_top_logprobs",
)
OPTIONAL = ("teacher_tail_logprobs", "teacher_forced_logprobs")


def check_row(place: str, row: dict[str, Any]) -> None:
    """Refuse a row that lacks a column, or whose lists do not agree.

    Raises:
        UserError: names the place.
    """
    missing = [name for name in REQUIRED if row.get(name) is None]
    if missing:
        raise UserError(
            f"{place} has no {', '.join(missing)}; expected the columns of docs/cache-format.md; "
            "add them"
        )
    tokens = 0 if row.get("refused") else len(row["completion_ids"])
    for name in REQUIRED[2:]:
        wanted = len(row["completion_ids"]) if name == "behavior_logprobs" else tokens
        if len(row[name]) != wanted:
            raise UserError(
                f"{place} has {len(row[name])} {name} for {wanted} completion tokens; expected one "
                "for each; mend the row"
            )
    for name in OPTIONAL:
        if row.get(name) is not None and len(row[name]) != tokens:
            raise UserError(
                f"{place} has {len(row[name])} {name} for {tokens} scored tokens; expected one for "
                "each, or none; mend the row"
            )
    _check_numbers(place, row)
    for ids, logprobs in zip(row["teacher_top_ids"], row["teacher_top_logprobs"], strict=True):
        if len(ids) != len(logprobs):
            raise UserError(
                f"{place} has {len(ids)} teacher_top_ids and {len(logprobs)} teacher_top_logprobs "
                "at a position; expected as many of one as of the other; mend the row"
            )


def _check_numbers(place: str, row: dict[str, Any]) -> None:
    flat = [("behavior_logprobs", row["behavior_logprobs"])]
    if not row.get("refused"):
        flat += [
            (name, row[name])
            for name in ("teacher_logprobs", "teacher_tail_logprobs")
            if row.get(name) is not None
        ]
        flat += [("teacher_top_logprobs", list(chain.from_iterable(row["teacher_top_logprobs"])))]
        forced = row.get("teacher_forced_logprobs") or []
        flat += [("teacher_forced_logprobs", list(chain.from_iterable(forced)))]
        if len({len(values) for values in forced}) > 1:
            raise UserError(
                f"{place} has unequal numbers of teacher_forced_logprobs at its positions; "
                "expected one for each forced id everywhere; mend the row"
            )
    for name, values in flat:
        if any(value is None or not value < math.inf for value in values):
            raise UserError(
                f"{place} has {name} that are no log-probabilities (null, NaN or infinite); mend "
                "the row"
            )
