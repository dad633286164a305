"""Size, error and speed of the teacher cache: `make bench-cache`.

One process, one thread, CPU seconds, repeats interleaved over formats; the median is reported. A
format's bytes are everything the teacher adds: candidates, tail, sampled token, keys.
"""

import argparse
import dataclasses
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from cache_formats import lance, parquet, parquet_default, raw_ipc
from cache_rows import ledger_rows, synthetic_rows, text_rows

from opd_stream.batches import collate
from opd_stream.objectives import Bucket
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import (
    Codec,
    CompactCodec,
    ExactCodec,
    decode_scores,
    encode_scores,
)
from opd_stream.store.reader import ScoredRows
from opd_stream.store.recipe import Recipe
from opd_stream.store.sealed import publish_record
from opd_stream.store.shards import batch_of, rollouts_table, schema_of, shard_bytes
from opd_stream.types import RolloutBatch, ScoreBatch
from opd_stream.windows import FixedWindow
from stages.student_model import load_student
from stages.train_data import BatchPlan, StepBatches, read_epoch

REPEATS = 5
WIDEST = 256  # candidates scored; smaller K are cut from it
STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"
Family = tuple[RolloutBatch, ScoreBatch, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-teacher", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rows = arguments.rows
    print(
        f"Python {platform.python_version()}, pyarrow {version('pyarrow')}, numpy "
        f"{version('numpy')}, {rows} rollouts a family, one thread, median of {REPEATS}\n"
    )
    families: dict[str, Family] = {
        "ledger (real, V 606)": ledger_rows(rows=rows, top_k=WIDEST),
        "text (real, V 16,384)": text_rows(arguments.text_teacher, rows=rows, top_k=WIDEST),
        "synthetic (V 151,936)": synthetic_rows(rows=rows, tokens_per_row=128, top_k=WIDEST),
    }
    for name, family in families.items():
        _sizes(name, family)
    _random_access(families["synthetic (V 151,936)"])
    _memory(families["synthetic (V 151,936)"])
    _loader_share(families["ledger (real, V 606)"])


def cut(scores: ScoreBatch, top_k: int) -> ScoreBatch:
    """The scores a smaller K would have given."""
    dropped = [np.exp(row[:, top_k:], dtype=np.float64) for row in scores.teacher_top_logprobs]
    with np.errstate(divide="ignore"):
        tails = tuple(
            np.log(np.exp(tail, dtype=np.float64) + row.sum(1)).astype(np.float32)
            for tail, row in zip(scores.teacher_tail_logprobs, dropped, strict=True)
        )
    return dataclasses.replace(
        scores,
        teacher_top_ids=tuple(row[:, :top_k] for row in scores.teacher_top_ids),
        teacher_top_logprobs=tuple(row[:, :top_k] for row in scores.teacher_top_logprobs),
        teacher_tail_logprobs=tails,
    )


def _sizes(name: str, family: Family) -> None:
    rollouts, scores, _ = family
    tokens = sum(len(row) for row in scores.teacher_logprobs)
    logprobs = np.concatenate(scores.teacher_top_logprobs)
    entropy = -(np.exp(logprobs) * logprobs).sum(1)
    print(
        f"## {name}: {tokens:,} tokens, entropy (of the top 256): "
        f"{(entropy < 0.01).mean():.0%} below 0.01, {(entropy > 0.67).mean():.0%} above 0.67 nats\n"
    )
    print(f"Order-0 entropy of ids and steps at K = 50: {_bound(scores):.1f} B/token\n")
    print(
        "| format | K | k | B/token | retained mass | error mean / max, nats "
        "| write k tok/s | read M tok/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases: list[tuple[str, int, Any]] = [
        ("exact", 16, ExactCodec()),
        ("compact", 16, CompactCodec()),
        ("exact", 50, ExactCodec()),
        ("compact", 50, CompactCodec()),
        ("compact, mass 0.999", 64, CompactCodec(mass=0.999)),
        ("compact, mass 0.999", 256, CompactCodec(mass=0.999)),
        ("raw IPC, int32 + float16", 50, raw_ipc),
        ("Parquet zstd, byte stream split", 50, parquet),
        ("Parquet zstd, default", 50, parquet_default),
    ]
    if importlib.util.find_spec("lance") is not None:  # pip install pylance
        cases.append(("Lance, default", 50, lance))
    measured: dict[int, list[tuple[float, float]]] = {place: [] for place in range(len(cases))}
    sizes: dict[int, tuple[int, dict[str, Any] | None]] = {}
    for _ in range(REPEATS):
        for place, (_, top_k, how) in enumerate(cases):
            size, report, seconds = _once(how, rollouts, cut(scores, top_k))
            sizes[place] = (size, report)
            measured[place].append(seconds)
    for place, (label, top_k, _) in enumerate(cases):
        size, report = sizes[place]
        write, read = (statistics.median(column) for column in zip(*measured[place], strict=True))
        figures = ("", "", "")
        if report is not None:
            figures = (
                f"{report['candidates_per_token']:.1f}",
                f"{report['retained_mass_mean']:.5f}",
                f"{report['logprob_error_mean']:.4f} / {report['logprob_error_max']:.4f}",
            )
        print(
            f"| {label} | {top_k} | {figures[0]} | {size / tokens:.1f} | {figures[1]} "
            f"| {figures[2]} | {tokens / write / 1e3:,.0f} | {tokens / read / 1e6:.2f} |"
        )
    print()


def _bound(scores: ScoreBatch) -> float:
    """Bytes a token that ideal codes without context would need for the candidates at K = 50.

    One code for all ids of the family, and one per rank for the differences of steps.
    """
    ids = np.concatenate([row[:, :50] for row in scores.teacher_top_ids])
    logprobs = np.concatenate([row[:, :50] for row in scores.teacher_top_logprobs])
    steps = np.rint(-logprobs * (32 / 1.998)).astype(np.int64)
    differences = np.diff(steps, axis=1, prepend=0)
    bits = _entropy(ids.reshape(-1)) + sum(_entropy(column) for column in differences.T)
    return bits / 8 / len(ids)


def _entropy(values: np.ndarray) -> float:
    """Bits of all values under their own frequencies."""
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * np.log2(len(values) / counts)).sum())


def _once(
    how: Any, rollouts: RolloutBatch, scores: ScoreBatch
) -> tuple[int, dict[str, Any] | None, tuple[float, float]]:
    """(bytes, fidelity report, (write seconds, read seconds))."""
    start = time.process_time()
    if not isinstance(how, ExactCodec | CompactCodec):
        data, read = how(scores)
        middle = time.process_time()
        read()
        return len(data), None, (middle - start, time.process_time() - middle)
    table, fidelity = encode_scores(how, scores, rollouts)
    data, parts = shard_bytes(table)
    middle = time.process_time()
    schema = schema_of(data[parts[0].offset : parts[0].offset + parts[0].length])
    for part in parts[1:]:
        block = decode_scores(batch_of(data[part.offset : part.offset + part.length], schema))
        torch.from_numpy(block.teacher_top_ids.astype(np.int64))
        torch.from_numpy(block.teacher_top_logprobs)
    return len(data), fidelity.report(), (middle - start, time.process_time() - middle)


def _random_access(family: Family) -> None:
    """64 rollouts as one training batch, from shards on a disk."""
    rollouts, scores, _ = family
    print("## One batch of 64 rollouts from a shard on a disk, verified, as training tensors\n")
    print("| codec | K | decode one record batch, ms | collate 64 rows of 128 tokens, ms |")
    print("|---|---|---|---|")
    cases: list[tuple[str, int, Codec]] = [
        ("exact", 16, ExactCodec()),
        ("compact", 16, CompactCodec()),
        ("compact, mass 0.999", 64, CompactCodec(mass=0.999)),
        ("compact", 50, CompactCodec()),
    ]
    for label, top_k, codec in cases:
        with tempfile.TemporaryDirectory() as folder:
            rows = _stored(Path(folder), rollouts, cut(scores, top_k), codec)
            reads, collates = [], []
            for repeat in range(12):
                fresh = ScoredRows(rows, memory_bytes=1)
                start = time.perf_counter()
                fresh[64 * (repeat % (len(fresh) // 64))]
                middle = time.perf_counter()
                first = 64 * (repeat % (len(fresh) // 64))
                chosen = [fresh[first + place] for place in range(64)]
                again = time.perf_counter()
                collate(chosen, window_tokens=4096)
                reads.append(middle - start)
                collates.append(time.perf_counter() - again)
        print(
            f"| {label} | {top_k} | {1e3 * statistics.median(reads):.1f} "
            f"| {1e3 * statistics.median(collates):.1f} |"
        )


def _memory(family: Family) -> None:
    """Resident memory of a reader whose store is larger than any memory it may use.

    The store is one shard under 1,600 names (hard links), so 10 GB are read but not stored.
    """
    rollouts, scores, _ = family
    print("\n## Memory of a reader\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ((source, target),) = _stored(root, rollouts, cut(scores, 50), ExactCodec(), units=1600)
        size = 0
        for artifact in (source, target):
            record = artifact.commit_record(0)
            assert record is not None
            for unit in range(1, 1600):
                name = f"units/{unit:05d}-{record.sha256[:8]}.arrow"
                (artifact.folder / name).hardlink_to(artifact.folder / record.file)
                copy = record.model_copy(update={"unit": unit, "file": name})
                publish_record(artifact.folder / "units" / f"{unit:05d}.json", copy)
            artifact.finish()
            size += 1600 * record.bytes
        code = (
            "import re, sys; from itertools import islice; "
            "from opd_stream.store import open_scores; "
            "status = lambda: open('/proc/self/status').read(); "
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]); "
            "base = peak(); rows = open_scores(sys.argv[1]); "
            "read = islice(rows.epoch(seed=0, epoch=0), 20000); "
            "tokens = sum(len(row.completion_ids) for row in read); "
            "print(base // 1024, peak() // 1024, tokens)"
        )
        command = [sys.executable, "-c", code, str(target.folder)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
    base, most, tokens = found.stdout.split()
    print(
        f"{size / 1e9:.1f} GB store, 409,600 rollouts, {int(tokens):,} tokens read in epoch order: "
        f"{most} MiB resident at most, of which {base} MiB are imports"
    )


def _loader_share(family: Family) -> None:
    """Time to make the batches of a quickstart round against a training step of that round."""
    rollouts, scores, _ = family
    with tempfile.TemporaryDirectory() as folder:
        stored = _stored(Path(folder), rollouts, cut(scores, 16), ExactCodec())
        plan = BatchPlan(
            rows_per_step=16,
            tokens_per_microbatch=16384,
            seed=0,
            first_step=0,
            window=FixedWindow(tokens=208),
        )
        seconds: list[float] = []
        steps: list[StepBatches] = []
        for _ in range(REPEATS):
            start = time.process_time()
            steps = list(read_epoch(ScoredRows(stored), plan, 0))
            seconds.append((time.process_time() - start) / len(steps))
        student = load_student(STUDENT, lora=None, initial=STUDENT, gradient_checkpointing=False)
        passes: list[float] = []
        for each in steps:
            start = time.process_time()
            for batch in each.batches:
                student(batch, (Bucket(),), merge_terminators=True, limit=None).loss.backward()
            passes.append(time.process_time() - start)
    loader, step = statistics.median(seconds), statistics.median(passes)
    print("\n## DataLoader share of a quickstart training step (window 208, 16 rows)\n")
    print(
        f"{1e3 * loader:.1f} ms CPU a batch, read, decode and collate; {1e3 * step:.0f} ms forward "
        f"and backward: the loader is {loader / (loader + step):.1%}"
    )


def _stored(
    root: Path, rollouts: RolloutBatch, scores: ScoreBatch, codec: Codec, *, units: int = 1
) -> list[tuple[Artifact, Artifact]]:
    table, fidelity = encode_scores(codec, scores, rollouts)
    source = Artifact(root, Recipe(kind="rollouts", settings={}, inputs={}))
    target = Artifact(
        root, Recipe(kind="scores", settings={}, inputs={"rollouts": source.fingerprint})
    )
    counts = {"rows": len(rollouts)}
    for artifact in (source, target):
        artifact.create(rows=units * len(rollouts), rows_per_unit=len(rollouts))
    record = source.commit(0, rollouts_table(rollouts), counts=counts)
    target.commit(0, table, counts=counts, source_sha256=record.sha256, fidelity=fidelity)
    return [(source, target)]


if __name__ == "__main__":
    main()
