"""A teacher cache of texts that are there already: JSON lines in, an artifact of scores out.

    python examples/score_texts.py examples/texts.jsonl --store store

Units that are committed are not made again, so a killed program goes on where it was. The name that
is printed opens with `opd_stream.store.open_scores`, and `opd-stream cache show` describes it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from opd_stream.engines import Engine, open_engine
from opd_stream.engines.base import ScoringSettings
from opd_stream.errors import UserError
from opd_stream.store import Artifact, Recipe, Store, rollouts_table
from opd_stream.store.codecs import ExactCodec, encode_scores
from opd_stream.store.files import sha256
from opd_stream.types import RolloutBatch

MODELS = Path(__file__).parent.parent / "configs" / "models"
ROWS_PER_UNIT = 64
ENGINE: dict[str, Any] = {"engine": "transformers", "dtype": "float32"}
CODEC = ExactCodec()


def main(arguments: Sequence[str] | None = None) -> str:
    """Score the texts; returns where the scores lie."""
    asked = _arguments(arguments)
    store = Store(asked.store)
    student, teacher = store.identify(asked.student), store.identify(asked.teacher)
    if student.tokenizer_sha256 != teacher.tokenizer_sha256:
        raise UserError(
            f"{asked.student} and {asked.teacher} have different tokenizers; expected the same "
            "one; choose a teacher of the student's family"
        )
    tokenizer = AutoTokenizer.from_pretrained(asked.student)
    texts = texts_of(asked.texts)
    stop = [tokenizer.eos_token_id]
    # All that decides the content and no path, so that the same texts are found again.
    rollouts = store.artifact(
        Recipe(
            kind="rollouts",
            settings={**ENGINE, "texts": sha256(asked.texts.read_bytes()), "stop_ids": stop},
            inputs={"student": student.fingerprint},
        )
    )
    scores = store.artifact(
        Recipe(
            kind="scores",
            settings={
                **ENGINE,
                "top_k": asked.top_k,
                "forced_ids": stop,
                "codec": CODEC.model_dump(),
            },
            inputs={"rollouts": rollouts.fingerprint, "teacher": teacher.fingerprint},
        )
    )
    for artifact in (rollouts, scores):
        artifact.create(rows=len(texts), rows_per_unit=ROWS_PER_UNIT)
    missing = [unit for unit in scores.units() if scores.commit_record(unit) is None]
    if missing:
        writer, scorer = _engine(asked.student), _engine(asked.teacher)
        for unit in missing:
            rows = scores.unit_rows(unit)
            batch = rollouts_of(texts[rows.start : rows.stop], rows.start, tokenizer, writer)
            score_unit(unit, batch, rollouts, scores, scorer, top_k=asked.top_k, stop_ids=stop)
    for artifact in (rollouts, scores):
        artifact.finish()
    print(f"units scored: {len(missing)} of {len(scores.units())}")
    print(f"{asked.store}/{scores.name}")
    return f"{asked.store}/{scores.name}"


def texts_of(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each line."""
    texts: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if missing := {"prompt", "completion"} - set(row):
            raise UserError(
                f"{path} line {number} has no {', '.join(sorted(missing))}; expected one JSON "
                "object a line with prompt and completion; add it"
            )
        texts.append((row["prompt"], row["completion"]))
    return texts


def rollouts_of(
    texts: Sequence[tuple[str, str]], first: int, tokenizer: Any, writer: Engine
) -> RolloutBatch:
    """The texts as if the student had written them, with the log-probabilities it gives them."""

    def ids(text: str, before: list[int], after: list[int]) -> np.ndarray:
        return np.array([*before, *tokenizer.encode(text, add_special_tokens=False), *after])

    batch = RolloutBatch(
        prompt_id=tuple(f"text-{first + number}" for number in range(len(texts))),
        sample_index=np.zeros(len(texts), np.int32),
        prompt_ids=tuple(ids(prompt, [tokenizer.bos_token_id], []) for prompt, _ in texts),
        completion_ids=tuple(ids(text, [], [tokenizer.eos_token_id]) for _, text in texts),
        behavior_logprobs=(),
        finish_reason=("stop",) * len(texts),
    )
    by_student = writer.score(batch, ScoringSettings(top_k=1, forced_ids=()))
    return replace(batch, behavior_logprobs=by_student.teacher_logprobs)


def score_unit(
    unit: int,
    batch: RolloutBatch,
    rollouts: Artifact,
    scores: Artifact,
    teacher: Engine,
    *,
    top_k: int,
    stop_ids: Sequence[int],
) -> None:
    """Commit the texts of a unit, then what the teacher says of them."""
    counts = {"rows": len(batch), "completion_tokens": batch.completion_tokens}
    source = rollouts.commit(unit, rollouts_table(batch), counts=counts)
    scored = teacher.score(batch, ScoringSettings(top_k=top_k, forced_ids=tuple(stop_ids)))
    table, fidelity = encode_scores(CODEC, scored, batch)
    scores.commit(
        unit,
        table,
        counts=counts,
        source_sha256=source.sha256,
        skipped_rows=sorted(scored.refused),
        fidelity=fidelity,
    )


def _engine(folder: Path) -> Engine:
    return open_engine(**ENGINE, folder=folder, batch_rows=16)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score texts with a teacher.")
    parser.add_argument("texts", type=Path, help="JSON lines with prompt and completion")
    parser.add_argument("--store", default="store", help="folder or s3://BUCKET/PATH")
    parser.add_argument("--student", type=Path, default=MODELS / "ledger-student")
    parser.add_argument("--teacher", type=Path, default=MODELS / "ledger-teacher")
    parser.add_argument("--top-k", type=int, default=8, help="candidates of the teacher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
