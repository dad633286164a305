"""Teacher caches of other programs, in and out: Parquet, `datasets` folders and JSON lines.

One row is one scored rollout, with the columns below; docs/cache-format.md describes them. A file
that was exported and imported again holds the same values.
"""

import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opd_stream.errors import UserError, shortened
from opd_stream.section import is_object
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
    BrokenLaw,
    check_agreement,
    check_rollouts,
    check_scores,
)
from opd_stream.store.files import sha256_file
from opd_stream.store.imported_rows import PlacedRow, imported_batches
from opd_stream.store.lines import lines_of, parse_json
from opd_stream.store.parquet import parquet_rows
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
        ("loss_mask", pa.list_(pa.bool_())),  # left out where every token may train
    ]
)
CONVERSATION = ("messages", "tools")  # in place of ids
_WITHOUT_MASK = COLUMNS.remove(COLUMNS.get_field_index("loss_mask"))
AsIds = Callable[[str, dict[str, Any]], dict[str, Any]]  # of a row with messages: its place, itself
UnitReport = Callable[[int, int, int], object]  # units done, of how many, tokens of the latest


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
    as_ids: AsIds | None = None,
    after_unit: UnitReport = _silent,
) -> Artifact:
    """Make rollouts and scores artifacts of a JSONL(.zst) or Parquet file, or a folder of Parquet.

    `stop_ids` are the terminators that the first columns of teacher_forced_logprobs speak of, ids
    are below `vocabulary` (None: it is not known), `as_ids` makes ids of rows with messages (None:
    they are refused), and `after_unit` is called before the first unit and after each. Every row is
    checked before anything is written.

    Raises:
        UserError: a row is missing a column, its lengths do not agree, or it holds values that no
            reader takes (file, row, column and value named).
    """
    if isinstance(codec, HiddenCodec):
        raise UserError(
            "codec hidden stores a teacher's hidden states, which files of scores do not hold; "
            "expected --codec {kind: exact} or {kind: compact}"
        )
    files = _files(source)
    digests = [sha256_file(file) for file in files]
    ids = list(stop_ids)
    rows, keys, conversations = 0, set[tuple[str, int]](), hashlib.sha256()
    has_mask = False
    for chunk in _chunks(files, as_ids):
        batch = _encoded(chunk, codec, ids, vocabulary, keys)[0]
        rows += len(chunk)
        has_mask |= batch.loss_mask is not None
        if as_ids is not None:
            for text in chain(batch.prompt_ids, batch.completion_ids, batch.loss_mask or ()):
                conversations.update(text.tobytes())
    if rows == 0:
        raise UserError(f"{source} holds no rows; expected one scored rollout a row")
    settings: dict[str, Any] = {"imported": digests, **({"stop_ids": ids} if ids else {})}
    if as_ids is not None:  # tokenizer and template decide them
        settings["ids"] = conversations.hexdigest()
    rollouts = store.artifact(Recipe(kind="rollouts", settings=settings, inputs={}))
    settings = {"imported": digests, "codec": codec.model_dump(), "forced_ids": ids}
    inputs = {"rollouts": rollouts.fingerprint}
    scores = store.artifact(Recipe(kind="scores", settings=settings, inputs=inputs))
    for artifact in (rollouts, scores):
        artifact.create(rows=rows, rows_per_unit=ROWS_PER_UNIT)
    units = scores.units()
    after_unit(0, len(units), 0)
    for unit, chunk in zip(units, _chunks(files, as_ids), strict=True):
        tokens = _import_unit((rollouts, scores), unit, chunk, codec, ids, has_mask=has_mask)
        after_unit(unit + 1, len(units), tokens)
    for artifact in (rollouts, scores):
        artifact.finish()
    return scores


def _files(source: Path) -> list[Path]:
    """The files of rows that a path names."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{source} is no file and no folder of Parquet files; expected .jsonl, .jsonl.zst or "
            ".parquet; check the path"
        )
    return files


def _import_unit(
    artifacts: tuple[Artifact, Artifact],
    unit: int,
    chunk: list[PlacedRow],
    codec: Codec,
    stop_ids: Sequence[int],
    *,
    has_mask: bool,
) -> int:
    """Commit rows as a unit of (rollouts, scores); returns their completion tokens."""
    rollouts, scores = artifacts
    batch, scored, table, fidelity = _encoded(chunk, codec, stop_ids, None, set())
    if has_mask and batch.loss_mask is None:  # of no row of this unit
        every = tuple(np.ones(len(ids), np.bool_) for ids in batch.completion_ids)
        batch = replace(batch, loss_mask=every)
    own = sum(int(batch.own_tokens(row).sum()) for row in range(len(batch)))
    counts = {"rows": len(batch), "completion_tokens": own}
    if batch.loss_mask is not None:
        counts["context_tokens"] = batch.completion_tokens - own
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


def _chunks(files: Sequence[Path], as_ids: AsIds | None) -> Iterator[list[PlacedRow]]:
    """The rows of all files, a unit at a time."""
    every_row = (_in_ids(*item, as_ids) for file in files for item in _rows_of(file))
    while chunk := list(islice(every_row, ROWS_PER_UNIT)):
        yield chunk


def _in_ids(place: str, row: object, as_ids: AsIds | None) -> PlacedRow:
    """A row whose messages, if it has some, became ids."""
    if not is_object(row) or row.get("messages") is None:
        return place, row
    if as_ids is None:
        raise UserError(
            f"{place} has messages in place of ids; expected the tokenizer that makes ids of them; "
            "name its folder with --tokenizer"
        )
    return place, as_ids(place, row)


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
    batch, scored = imported_batches(chunk, stop_ids)
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
    for name in [name for name in _WITHOUT_MASK.names if name not in keys]:
        column = pa.array([], COLUMNS.field(name).type) if joined is None else joined[name]
        table = table.append_column(name, column)
    schema = COLUMNS if "loss_mask" in keys else _WITHOUT_MASK
    return table.select(schema.names).cast(schema)


def _rows_of(file: Path) -> Iterator[PlacedRow]:
    """The rows of a file, as they are."""
    if file.suffix == ".parquet":
        for number, row in enumerate(parquet_rows(file, (*COLUMNS.names, *CONVERSATION)), 1):
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
