"""Codec hidden on a real pair: bytes a token against what rounding costs, and its time.

`python -m benchmarks.hidden` reads text of the teacher and of two students, rounds the teacher's
states to several bounds, packs and unpacks them as shards do, and compares whole distributions. The
basis is fitted on other prompts. Then a training step of one micro-batch, forward and backward, on
candidates, on candidates that are rebuilt, and on the whole vocabulary. Processor seconds of one
thread. The lines go to benchmarks/results/hidden.jsonl; figures that are there are kept.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.coverage import MODELS, chat_prompts, open_real
from opd_stream.batches import Batch, collate
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.head import output_head
from opd_stream.engines.loading import load_model
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.fused import OutputHead
from opd_stream.hidden_states import StateRounding, exact_head, fit_basis, scores_of_states
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.codecs import HiddenCodec, decode_scores, encode_scores
from opd_stream.store.codecs.hidden import StateBasis, states_of
from opd_stream.store.reader import ScoredRow
from opd_stream.store.shards import shard_bytes, table_of
from opd_stream.types import PromptBatch, RolloutBatch

RESULTS = Path(__file__).parent / "results" / "hidden.jsonl"
WRITERS = ("teacher", "noisy", "pruned26")
BOUNDS = (0.0001, 0.0005, 0.002, 0.005, 0.02)
PROMPTS, WINDOW, FITTED = 16, 48, 2048
STOPS = (2,)
UNBOUNDED = 1e9  # of the 99th percentile, which is what is measured here
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = _read(arguments.out)
    done = {(line["text"], line["seed"]) for line in lines if line["kind"] == "curve"}
    missing = [
        (text, seed)
        for seed in range(arguments.seeds)
        for text in WRITERS
        if (text, seed) not in done
    ]
    has_step = any(line["kind"] == "step" for line in lines)
    if not missing and has_step:
        return
    prompts = chat_prompts(64)
    teacher = open_real("teacher")
    head = exact_head(teacher.head())
    basis = fit_basis(_prompt_states(teacher, _part(prompts, PROMPTS, 64)), head)
    rounding = StateRounding(basis, head)
    few = _part(prompts, 0, PROMPTS)
    settings = SamplingSettings(window_tokens=WINDOW, stop_ids=STOPS)
    with arguments.out.open("a") as file:
        for text, seed in missing:
            writer = teacher if text == "teacher" else open_real(text)
            rollouts = writer.sample(few, replace(settings, seed=seed))
            student = writer if text != "teacher" else open_real("noisy")
            for line in _curve(teacher, student, head, basis, rounding, rollouts):
                _write(file, {"kind": "curve", "text": text, "seed": seed, **line})
        if not has_step:
            rollouts = open_real("noisy").sample(few, settings)
            for line in _steps(teacher, head, basis, rounding, rollouts):
                _write(file, {"kind": "step", **line})


def _curve(
    teacher: Any,
    student: Any,
    head: OutputHead,
    basis: StateBasis,
    rounding: StateRounding,
    rollouts: RolloutBatch,
) -> Iterator[Line]:
    """A line for each bound."""
    hidden, forward = _timed(lambda: teacher.hidden(rollouts))
    states = np.concatenate(hidden.states)
    own = np.concatenate(student.hidden(rollouts).states)
    own_head, tokens = exact_head(student.head()), len(states)
    asked = ScoringSettings(top_k=HiddenCodec().candidates, forced_ids=STOPS)
    scores, scoring = _timed(lambda: scores_of_states(hidden, head, rollouts, asked))
    for bound in BOUNDS:
        rounded, rounds = _timed(
            lambda bound=bound: rounding.rounded(states, max_kl=bound, max_kl_p99=UNBOUNDED)
        )
        rows = np.split(rounded.integers_NH, np.cumsum([len(row) for row in hidden.states])[:-1])
        batch = replace(scores, teacher_states=tuple(rows))
        (table, _), packs = _timed(
            lambda batch=batch: encode_scores(HiddenCodec(max_kl=0.0005), batch, rollouts)
        )
        data = shard_bytes(table)[0]
        plain = shard_bytes(
            table.select([name for name in table.column_names if "hidden" not in name])
        )[0]
        rebuilt, unpacks = _timed(lambda data=data: _unpacked(data, basis))
        found = _compared(states, rebuilt, head, own, own_head)
        yield {
            "max_kl": bound,
            "tokens": tokens,
            "channels": states.shape[1],
            "bytes": round(len(data) / tokens, 1),
            "state_bytes": round((len(data) - len(plain)) / tokens, 1),
            "bits_per_channel": round(8 * (len(data) - len(plain)) / states.size, 3),
            **found,
            "forward_ms": round(1e3 * forward / tokens, 3),
            "scores_ms": round(1e3 * scoring / tokens, 3),
            "round_ms": round(1e3 * rounds / tokens, 3),
            "pack_ms": round(1e3 * packs / tokens, 3),
            "unpack_ms": round(1e3 * unpacks / tokens, 3),
        }


def _unpacked(data: bytes, basis: StateBasis) -> NDArray[np.float32]:
    blocks = [decode_scores(batch, basis) for batch in table_of(data).to_batches()]
    return np.concatenate(states_of([row for each in blocks for row in each.teacher_states or ()]))


@torch.inference_mode()
def _compared(
    true: NDArray[np.float32],
    rebuilt: NDArray[np.float32],
    head: OutputHead,
    own: NDArray[np.float32],
    own_head: OutputHead,
) -> Line:
    """KL of the true to the rebuilt distributions, and the student's reverse KL by both."""
    kls: list[torch.Tensor] = []
    for start in range(0, len(true), 64):
        part = slice(start, start + 64)
        q, r = (head(torch.tensor(side[part])).log_softmax(1) for side in (true, rebuilt))
        p = own_head(torch.tensor(own[part])).log_softmax(1)
        sums = [(q.exp() * (q - r)), p.exp() * (p - q), p.exp() * (p - r)]
        kls.append(torch.stack([each.sum(1) for each in sums]))
    kl, exact, seen = torch.cat(kls, dim=1).double().numpy()
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "reverse_kl": float(exact.mean()),
        "reverse_kl_rebuilt": float(seen.mean()),
        "reverse_kl_error": float(np.abs(seen - exact).mean()),
    }


def _steps(
    teacher: Any,
    head: OutputHead,
    basis: StateBasis,
    rounding: StateRounding,
    rollouts: RolloutBatch,
) -> Iterator[Line]:
    """Processor seconds of a training step, forward and backward, three times each in turn."""
    rows = [_rows(teacher, head, basis, rounding, rollouts, top_k)[:8] for top_k in (64, 4)]
    plain = [replace(row, teacher_states=None) for row in rows[0]]
    model = load_model(MODELS / "noisy", dtype=torch.float32, device=torch.device("cpu"))
    size = len(head.weight_VH)
    ways: dict[str, tuple[list[ScoredRow], TeacherHead | None]] = {
        "candidates, K 64": (plain, None),
        "rebuilt, K 64": (rows[1], TeacherHead(head=head, top_k=64, vocabulary=size)),
        "whole vocabulary": (rows[1], TeacherHead(head=head, top_k=None, vocabulary=size)),
    }
    for repeat in range(3):
        for name, (chosen, rebuild) in ways.items():
            batch, collates = _timed(lambda chosen=chosen: collate(chosen, window_tokens=WINDOW))
            _, seconds = _timed(lambda b=batch, r=rebuild: _step(model, b, r))
            yield {
                "way": name,
                "repeat": repeat,
                "tokens": len(batch.weights_N),
                "collate_seconds": round(collates, 3),
                "step_seconds": round(seconds, 3),
            }


def _step(model: Any, batch: Batch, teacher: TeacherHead | None) -> None:
    model.zero_grad()
    hidden = rows_hidden(decoder_of(model), batch.input_ids_BL, batch.attention_mask_BL)
    batch_loss(hidden, output_head(model), batch, (Bucket(),), teacher=teacher).loss.backward()


def _rows(
    teacher: Any,
    head: OutputHead,
    basis: StateBasis,
    rounding: StateRounding,
    rollouts: RolloutBatch,
    top_k: int,
) -> list[ScoredRow]:
    """Rows as a reader gives them, with so many candidates and packed states."""
    hidden = teacher.hidden(rollouts)
    asked = ScoringSettings(top_k=top_k, forced_ids=STOPS)
    scores = scores_of_states(hidden, head, rollouts, asked)
    states = np.concatenate(hidden.states)
    integers = rounding.rounded(states, max_kl=0.0005, max_kl_p99=UNBOUNDED).integers_NH
    ends = np.cumsum([len(row) for row in hidden.states])
    scores = replace(scores, teacher_states=tuple(np.split(integers, ends[:-1])))
    table, _ = encode_scores(HiddenCodec(), scores, rollouts)
    (block,) = [decode_scores(batch, basis) for batch in table.to_batches()]
    assert block.teacher_states is not None
    return [
        ScoredRow(
            prompt_id=rollouts.prompt_id[row],
            sample_index=0,
            prompt_ids=rollouts.prompt_ids[row],
            completion_ids=rollouts.completion_ids[row],
            behavior_logprobs=rollouts.behavior_logprobs[row],
            loss_mask=None,
            finish_reason=rollouts.finish_reason[row],
            teacher_logprobs=scores.teacher_logprobs[row],
            teacher_top_ids=scores.teacher_top_ids[row].astype(np.uint32),
            teacher_top_logprobs=scores.teacher_top_logprobs[row],
            teacher_tail_logprobs=scores.teacher_tail_logprobs[row],
            teacher_forced_logprobs=scores.teacher_forced_logprobs[row],
            candidate_ids=None,
            candidate_behavior_logprobs=None,
            candidate_teacher_logprobs=None,
            terminators=(STOPS, (0,)),
            cache=0,
            teacher_states=block.teacher_states[row],
        )
        for row in range(len(rollouts))
    ]


def _prompt_states(teacher: Any, prompts: PromptBatch) -> NDArray[np.float32]:
    """States at every place of prompts, each different one once."""
    rows = range(len(prompts.prompt_ids))
    texts = RolloutBatch(
        prompt_id=prompts.prompt_id,
        sample_index=np.zeros(len(rows), np.int32),
        prompt_ids=tuple(ids[:1] for ids in prompts.prompt_ids),
        completion_ids=tuple(np.append(ids[1:], 0) for ids in prompts.prompt_ids),
        behavior_logprobs=tuple(np.zeros(len(ids), np.float32) for ids in prompts.prompt_ids),
        finish_reason=("length",) * len(rows),
    )
    states = np.concatenate(teacher.hidden(texts).states)
    _, places = np.unique(np.round(states, 3), axis=0, return_index=True)
    return states[np.sort(places)][:FITTED]


def _part(prompts: PromptBatch, first: int, last: int) -> PromptBatch:
    return PromptBatch(
        prompt_id=prompts.prompt_id[first:last], prompt_ids=prompts.prompt_ids[first:last]
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def _read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(file: Any, line: Line) -> None:
    print(json.dumps(line), flush=True)
    file.write(json.dumps(line) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
