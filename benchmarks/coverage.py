"""What candidates see of the reverse KL between a real pair, and what they cost: bytes a token.

`python -m benchmarks.coverage` samples rollouts of each student, takes both whole distributions of
every token, and compares supports: the teacher's K alone and unions with the student's own M. The
share is exact for these tokens, its standard error is over them; bytes are those of the shards,
scores and the student's ids together, by codec. The lines go to benchmarks/results/coverage.jsonl.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from opd_stream.coverage import Support, SupportShare, least_supports, support_shares
from opd_stream.engines import open_engine
from opd_stream.engines.base import RowScores, SamplingSettings, ranked_union, score_batch
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.store.codecs import Codec, CompactCodec, ExactCodec, encode_scores
from opd_stream.store.shards import rollouts_table, shard_bytes
from opd_stream.types import PromptBatch, RolloutBatch

ROOT = Path(__file__).parent.parent
MODELS, RESULTS = ROOT / "models" / "real", Path(__file__).parent / "results" / "coverage.jsonl"
QUESTIONS = ROOT / "examples" / "chat" / "questions.jsonl"
STUDENTS = ("noisy", "pruned26")
CODECS: dict[str, Codec] = {
    "compact, mass 0.999": CompactCodec(mass=0.999),
    "exact, float16": ExactCodec(dtype="float16"),
}
SUPPORTS = (
    *(Support(k) for k in (8, 32, 64, 128, 256, 512, 1024)),
    *(Support(0, k) for k in (32, 128)),
    *(Support(32, k) for k in (16, 32, 64, 128)),
    *(Support(8, k) for k in (64, 96)),
    *(Support(16, k) for k in (64, 96)),
    Support(64, 64),
    Support(128, 128),
    Support(256, 512),
)
Dense = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    prompts = chat_prompts(arguments.prompts)
    lines: list[dict[str, Any]] = []
    for name in STUDENTS:
        student = open_real(name)
        settings = SamplingSettings(
            window_tokens=arguments.window, stop_ids=(2,), seed=arguments.seed
        )
        batch = student.sample(prompts, settings)
        own = _dense(student, batch)
        del student
        theirs = _dense(open_real("teacher"), batch)
        shares = support_shares(np.concatenate(own), np.concatenate(theirs), SUPPORTS)
        for share in shares:
            line = {
                "student": name,
                "seed": arguments.seed,
                "tokens": batch.completion_tokens,
                **share.model_dump(),
                "bytes": _bytes(batch, own, theirs, share),
            }
            lines.append(line)
            print(json.dumps(line))
        for found in least_supports(shares):
            print(f"{name}: fewest ids with 90 %: K {found.top_k} + M {found.student_top_k}")
    arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def chat_prompts(count: int) -> PromptBatch:
    """Chat questions, rendered by the teacher's template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / "teacher", local_files_only=True)
    ids: list[NDArray[np.int32]] = []
    for line in QUESTIONS.read_text().splitlines()[:count]:
        row = json.loads(line)
        messages = row.get("messages") or [
            {"role": "user", "content": row.get("question") or row.get("prompt")}
        ]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(np.array(found, np.int32))
    names = tuple(f"question-{number}" for number in range(len(ids)))
    return PromptBatch(prompt_id=names, prompt_ids=tuple(ids))


def open_real(name: str) -> TransformersEngine:
    found = open_engine(engine="transformers", folder=MODELS / name, dtype="float32", batch_rows=24)
    assert isinstance(found, TransformersEngine)
    return found


@torch.inference_mode()
def _dense(engine: TransformersEngine, batch: RolloutBatch) -> list[Dense]:
    """The whole distribution at every token of each row [T, V], log-probabilities."""
    head, found = engine.head(), list[Dense]()
    for states in engine.hidden(batch).states:
        found.append(head(torch.from_numpy(states)).log_softmax(1).numpy())
    return found


def _bytes(
    batch: RolloutBatch, own: list[Dense], theirs: list[Dense], share: SupportShare
) -> dict[str, float]:
    """Bytes a token of a shard of scores and of the student's ids in the rollouts, by codec."""
    rows: list[RowScores] = []
    kept: list[NDArray[np.int64]] = []
    for tokens, log_p, log_q in zip(batch.completion_ids, own, theirs, strict=True):
        mine = _first(log_p, share.student_top_k)
        ids, top, tail = ranked_union(log_q, _first(log_q, share.top_k), mine)
        asked = np.take_along_axis(log_q, tokens.astype(np.int64)[:, None], axis=1)
        rows.append(RowScores(asked, ids, top, tail, log_q[:, [2]]))
        kept.append(mine)
    size = 0
    if share.student_top_k:
        plain = _file_bytes(rollouts_table(batch))
        batch = RolloutBatch(
            **{name: getattr(batch, name) for name in RolloutBatch.__slots__ if name in _SAMPLED},
            student_top_ids=tuple(kept),
        )
        size = _file_bytes(rollouts_table(batch)) - plain
    scores = score_batch(rows, batch)
    sizes = {
        name: size + _file_bytes(encode_scores(codec, scores, batch)[0])
        for name, codec in CODECS.items()
    }
    return {name: round(each / batch.completion_tokens, 1) for name, each in sizes.items()}


_SAMPLED = (
    *("prompt_id", "sample_index", "prompt_ids", "completion_ids"),
    *("behavior_logprobs", "finish_reason"),
)


def _first(logprobs_TV: Dense, count: int) -> NDArray[np.int64]:
    """The `count` most probable ids, by rank [T, count]."""
    return torch.from_numpy(logprobs_TV).topk(count, dim=1).indices.numpy()


def _file_bytes(table: pa.Table) -> int:
    return len(shard_bytes(table)[0])


if __name__ == "__main__":
    main()
