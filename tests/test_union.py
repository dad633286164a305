"""Candidates of both sides: the student's own most probable ids beside the teacher's.

`rollouts.student_top_k` keeps them with the rollouts and the teacher scores them, so a divergence
runs over the union of both supports, its tail summed where the whole distribution was seen.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opd_stream.batches import collate
from opd_stream.engines import open_engine
from opd_stream.engines.base import (
    RowScores,
    SamplingSettings,
    ScoringSettings,
    ranked_union,
    score_batch,
)
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.logprobs import head_scores
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket, EntropyAware, Hybrid, Lsm, Objective, Skew
from opd_stream.store.codecs import Codec, CompactCodec, ExactCodec, decode_scores, encode_scores
from opd_stream.store.exchange import export_scores, import_scores
from opd_stream.store.reader import ScoredRow, open_scores
from opd_stream.store.shards import rollouts_batch, rollouts_table
from opd_stream.store.store import Store
from opd_stream.types import PromptBatch, RolloutBatch
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from tests.conftest import MODELS, SmallRuns, small_config

VOCABULARY, HIDDEN, TOP_K, OWN = 23, 6, 3, 4
UNION = ("rollouts.student_top_k=5", "scores.top_k=4")
Floats = NDArray[np.float64]


def log_softmax(logits: Floats) -> Floats:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def first(logprobs_TV: Floats, count: int) -> NDArray[np.int64]:
    return np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :count]


def scored_row(number: int, tokens: int, *, top_k: int, own: int) -> tuple[ScoredRow, Floats]:
    """A row whose candidates are the union, and the teacher's whole distribution [T, V]."""
    random = np.random.default_rng(number)
    teacher = log_softmax(random.normal(size=(tokens, VOCABULARY)) * 2)
    guess = log_softmax(teacher + random.normal(size=(tokens, VOCABULARY)) * 2)  # at sampling
    own_ids = first(guess, own)
    ids, top, tail = ranked_union(teacher, first(teacher, top_k), own_ids)
    widest = int((top > -np.inf).sum(1).max())
    ids, top = ids[:, :widest], top[:, :widest]
    drawn = random.integers(0, VOCABULARY, tokens)
    return ScoredRow(
        prompt_id=f"p{number}",
        sample_index=0,
        prompt_ids=random.integers(0, VOCABULARY, 2 + number),
        completion_ids=drawn,
        behavior_logprobs=np.full(tokens, -2.0, np.float32),
        loss_mask=None,
        finish_reason="length",
        teacher_logprobs=teacher[np.arange(tokens), drawn].astype(np.float32),
        teacher_top_ids=ids.astype(np.uint32),
        teacher_top_logprobs=top,
        teacher_tail_logprobs=tail,
        teacher_forced_logprobs=teacher[:, [1, 2]].astype(np.float32),
        candidate_ids=None,
        candidate_behavior_logprobs=None,
        candidate_teacher_logprobs=None,
        terminators=((1, 2), (0, 1)),
        cache=0,
        student_top_ids=own_ids,
    ), teacher


OBJECTIVES: list[Objective] = [
    Bucket(),
    Bucket(direction="forward"),
    Bucket(direction="js"),
    Skew(),
    Lsm(),
    Hybrid(),
    EntropyAware(threshold=0.1),
]


def trained(
    rows: list[ScoredRow], objective: Objective, *, merge: bool
) -> tuple[float, torch.Tensor]:
    """Loss and gradient in the head of a student whose hidden state is the token before."""
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, HIDDEN)
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    batch = collate(rows, window_tokens=9)
    found = batch_loss(
        table[batch.input_ids_BL],
        OutputHead(weight_VH=weight),
        batch,
        (objective,),
        merge_terminators=merge,
    )
    found.loss.backward()
    assert weight.grad is not None
    return found.loss.item(), weight.grad


def dense_reference(
    pairs: list[tuple[ScoredRow, Floats]], objective: Objective, *, merge: bool
) -> tuple[float, torch.Tensor]:
    """The same in float64 from whole distributions: outcomes are sets of ids, their masses sums."""
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, HIDDEN).double()
    weight = torch.randn(VOCABULARY, HIDDEN).double().requires_grad_()
    losses: list[torch.Tensor] = []
    for row, teacher in pairs:
        text = np.concatenate([row.prompt_ids, row.completion_ids])[len(row.prompt_ids) - 1 : -1]
        student = torch.log_softmax(table[torch.tensor(text)] @ weight.T, dim=1)
        for place, token in enumerate(row.completion_ids.tolist()):
            is_there = row.teacher_top_logprobs[place] > -np.inf
            ids = row.teacher_top_ids[place][is_there].tolist()
            groups = [[each] for each in ids if not merge or each not in (1, 2)]
            groups += [[1, 2]] if merge else []
            inside = [each for group in groups for each in group]
            rest = [each for each in range(VOCABULARY) if each not in inside]
            p = torch.stack([student[place, group].logsumexp(0) for group in groups])
            q = torch.stack([torch.tensor(teacher[place][group]).logsumexp(0) for group in groups])
            tail = (
                [student[place, rest].logsumexp(0)] if rest else [],
                [torch.tensor(teacher[place][rest]).logsumexp(0)] if rest else [],
            )
            log_p, log_q = (
                torch.cat([p, *[t[None] for t in tail[0]]]),
                torch.cat([q, *[t[None] for t in tail[1]]]),
            )
            losses.append(_divergence(objective, log_p, log_q, p, q))
            if isinstance(objective, Hybrid) and token not in inside:
                drawn = student[place, token]
                weight_y = (drawn.detach() + 2.0).exp().clamp(max=objective.importance_cap)
                gap = drawn.detach() - teacher[place, token] - (log_p[-1] - log_q[-1]).detach()
                losses[-1] = losses[-1] + weight_y * (drawn - drawn.detach()).exp() * gap
    loss = torch.stack(losses).mean()
    loss.backward()
    assert weight.grad is not None
    return loss.item(), weight.grad


def _divergence(
    objective: Objective,
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    head_p: torch.Tensor,
    head_q: torch.Tensor,
) -> torch.Tensor:
    def kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.exp() * (left - right)).sum()

    match objective:
        case Lsm():
            return kl(head_p.log_softmax(0), head_q.log_softmax(0))
        case EntropyAware():
            is_unsure = -(log_q.exp() * log_q).sum() > objective.threshold
            return kl(head_q.log_softmax(0), head_p) * is_unsure
        case Skew(alpha=alpha):
            return kl(log_p, (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log())
        case Bucket(direction="forward"):
            return kl(log_q, log_p)
        case Bucket(direction="js", beta=beta):
            mixture = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
            return beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture)
        case _:
            return kl(log_p, log_q)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_every_dense_objective_on_a_union_is_that_of_whole_distributions(
    objective: Objective, merge: bool
) -> None:
    pairs = [scored_row(n, tokens, top_k=TOP_K, own=OWN) for n, tokens in enumerate((5, 3, 8))]
    loss, gradient = trained([row for row, _ in pairs], objective, merge=merge)
    expected, dense = dense_reference(pairs, objective, merge=merge)
    assert loss == pytest.approx(expected, rel=2e-5)
    torch.testing.assert_close(gradient.double(), dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=lambda o: o.kind)
def test_a_union_of_everything_is_the_whole_vocabulary_and_the_full_divergence(
    objective: Objective,
) -> None:
    """All ids by the teacher, all by the student, or both: one loss, one gradient."""
    found = [
        trained([scored_row(n, 6, top_k=k, own=own)[0] for n in range(3)], objective, merge=False)
        for k, own in ((VOCABULARY, 0), (1, VOCABULARY), (VOCABULARY, VOCABULARY))
    ]
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-5)
    if objective == Bucket():
        full, dense = dense_reference(
            [scored_row(n, 6, top_k=VOCABULARY, own=0) for n in range(3)], objective, merge=False
        )
        assert found[1][0] == pytest.approx(full, rel=2e-5)
        torch.testing.assert_close(found[1][1].double(), dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", [None, 600])
@pytest.mark.parametrize("own", [1, 40])
def test_a_head_scores_the_union_with_its_own_tail(own: int, limit: int | None) -> None:
    generator = torch.Generator().manual_seed(own)
    logits = torch.randn(21, 700, generator=generator).mul(4)
    logits[0] = torch.arange(700.0, 0, -1)  # a tail far below rounding
    known = logits[:, :limit]
    student = known + torch.randn(known.shape, generator=generator).mul(3)
    own_ids = student.topk(own, dim=1).indices
    scores = head_scores(
        logits,
        lambda hidden: hidden,
        asked_ids_NJ=torch.zeros(21, 1, dtype=torch.long),
        forced_ids_F=torch.tensor([3]),
        top_k=5,
        chunk_rows=8,
        student_ids_NM=own_ids,
        vocabulary=limit,
    )
    dense = torch.log_softmax(logits.double(), dim=1)
    for row in range(21):
        best = known[row].topk(5).indices.tolist()
        expected = sorted({*best, *own_ids[row].tolist()}, key=lambda each: -dense[row, each])
        present = scores.top_NK[row] > -torch.inf
        found = scores.top_ids_NK[row][present].tolist()
        assert found == expected
        assert not scores.top_ids_NK[row][~present].any()
        torch.testing.assert_close(
            scores.top_NK[row][present].double(), dense[row, expected], atol=1e-5, rtol=1e-6
        )
        outside = [each for each in range(700) if each not in expected]
        tail = dense[row, outside].logsumexp(0)
        torch.testing.assert_close(scores.tail_N[row].double(), tail, atol=1e-5, rtol=1e-6)


def encoded_row(row: ScoredRow, codec: Codec) -> ScoredRow:
    """A row as a shard gives it back."""
    batch = RolloutBatch(
        prompt_id=(row.prompt_id,),
        sample_index=np.zeros(1, np.int32),
        prompt_ids=(row.prompt_ids,),
        completion_ids=(row.completion_ids,),
        behavior_logprobs=(row.behavior_logprobs,),
        finish_reason=("length",),
        student_top_ids=(row.student_top_ids,) if row.student_top_ids is not None else None,
    )
    top = RowScores(
        row.teacher_logprobs[:, None],
        row.teacher_top_ids.astype(np.int32),
        row.teacher_top_logprobs,
        row.teacher_tail_logprobs,
        row.teacher_forced_logprobs,
    )
    table, fidelity = encode_scores(codec, score_batch([top], batch), batch)
    block = decode_scores(table.to_batches()[0])
    stored = rollouts_batch(rollouts_table(batch))
    assert stored.student_top_ids is not None
    assert fidelity.entries == (block.teacher_top_logprobs > -np.inf).sum()
    return dataclasses.replace(
        row,
        teacher_top_ids=block.teacher_top_ids,
        teacher_top_logprobs=block.teacher_top_logprobs,
        teacher_tail_logprobs=block.teacher_tail_logprobs,
        student_top_ids=stored.student_top_ids[0],
    )


@pytest.mark.parametrize("mass", [None, 0.5, 0.9, 1.0])
def test_compact_keeps_the_students_ids_whatever_the_mass(mass: float | None) -> None:
    row, teacher = scored_row(4, 40, top_k=9, own=OWN)
    assert row.student_top_ids is not None
    stored = encoded_row(row, CompactCodec(max_error=1 / 64, mass=mass))
    sizes: set[int] = set()
    for place in range(40):
        is_there = stored.teacher_top_logprobs[place] > -np.inf
        ids = stored.teacher_top_ids[place][is_there].astype(int)
        values = stored.teacher_top_logprobs[place][is_there]
        assert {*row.student_top_ids[place].tolist()} <= {*ids.tolist()}
        assert len({*ids.tolist()}) == len(ids)
        np.testing.assert_allclose(values, teacher[place][ids], atol=1 / 64)
        outside = np.delete(teacher[place], ids)
        tail = np.log(np.exp(outside).sum())
        assert stored.teacher_tail_logprobs[place] == pytest.approx(tail, abs=1 / 64)
        if mass is not None:
            union = row.teacher_top_logprobs[place]
            needed = int((np.exp(union).cumsum() < mass).sum()) + 1
            rank = set(row.teacher_top_ids[place][:needed][union[:needed] > -np.inf].tolist())
            assert set(ids.tolist()) == rank | set(row.student_top_ids[place].tolist())
        sizes.add(len(ids))
    assert len(sizes) > 1


@pytest.mark.parametrize("codec", [ExactCodec(dtype="float32"), CompactCodec(max_error=1 / 256)])
@pytest.mark.parametrize("top_k", [1, 4])
def test_fewer_candidates_of_the_teacher_leave_the_students(codec: Codec, top_k: int) -> None:
    """What a larger K cached serves a smaller one, as if it had been scored so."""
    large, _ = scored_row(2, 30, top_k=9, own=OWN)
    small, _ = scored_row(2, 30, top_k=top_k, own=OWN)
    cut = encoded_row(large, codec).first_candidates(top_k)
    assert cut.teacher_top_ids.shape[1] == small.teacher_top_ids.shape[1] or top_k == 1
    width = cut.teacher_top_ids.shape[1]
    is_there = small.teacher_top_logprobs[:, :width] > -np.inf
    np.testing.assert_array_equal(
        np.where(is_there, cut.teacher_top_ids, 0), small.teacher_top_ids[:, :width]
    )
    for name in ("teacher_top_logprobs", "teacher_tail_logprobs"):
        mine, other = getattr(cut, name), getattr(small, name)
        mine, other = np.exp(mine), np.exp(other if other.ndim == 1 else other[:, :width])
        np.testing.assert_allclose(mine, other, rtol=2e-2 if "tail" in name else 5e-3)


def test_a_run_on_a_union_scores_the_ids_that_the_student_prefers(small_runs: SmallRuns) -> None:
    folder = small_runs(*UNION)
    summary = RunFolder(folder / "run").summary()
    assert summary is not None
    rows = open_scores(folder / "store" / "scores" / summary.caches[0][0].scores[:16])
    engine = open_engine(
        engine="transformers", folder=MODELS / "ledger-student", dtype="float32", batch_rows=8
    )
    teacher = open_engine(
        engine="transformers", folder=MODELS / "ledger-teacher", dtype="float32", batch_rows=8
    )
    plain, vocabulary = ScoringSettings(top_k=606), 606
    seen: set[int] = set()
    for row in (rows[0], rows[5]):
        batch = RolloutBatch(
            prompt_id=("p",),
            sample_index=np.zeros(1, np.int32),
            prompt_ids=(row.prompt_ids,),
            completion_ids=(row.completion_ids,),
            behavior_logprobs=(row.behavior_logprobs,),
            finish_reason=("length",),
        )
        student, whole = engine.score(batch, plain), teacher.score(batch, plain)
        for place in range(len(row.completion_ids)):
            own = set(student.teacher_top_ids[0][place, :5].tolist())
            expected = own | set(whole.teacher_top_ids[0][place, :4].tolist())
            is_there = row.teacher_top_logprobs[place] > -np.inf
            assert set(row.teacher_top_ids[place][is_there].tolist()) == expected
            assert row.student_top_ids is not None
            assert set(row.student_top_ids[place].tolist()) == own
            logprobs = np.empty(vocabulary)
            logprobs[whole.teacher_top_ids[0][place]] = whole.teacher_top_logprobs[0][place]
            outside = np.delete(logprobs, sorted(expected))
            assert np.exp(row.teacher_tail_logprobs[place]) == pytest.approx(
                np.exp(outside).sum(), abs=1e-5
            )
            seen.add(len(expected))
    assert min(seen) < 9
    assert max(seen) > 5


def test_ids_beside_the_samples_change_nothing_that_is_sampled(small_runs: SmallRuns) -> None:
    plain, union = (RunFolder(small_runs(*each) / "run").summary() for each in ((), UNION))
    assert plain is not None
    assert union is not None
    assert plain.caches[0][0].rollouts != union.caches[0][0].rollouts
    texts = [
        [
            row.completion_ids.tolist()
            for row in open_scores(small_runs(*each) / "store" / "scores" / name[:16]).epoch(
                seed=0, epoch=0
            )
        ]
        for each, name in (((), plain.caches[0][0].scores), (UNION, union.caches[0][0].scores))
    ]
    assert texts[0] == texts[1]
    assert plain.policies[-1].weights_sha256 != union.policies[-1].weights_sha256


def test_extended_rollouts_keep_the_ids_of_old_and_new_tokens() -> None:
    engine = open_engine(
        engine="transformers", folder=MODELS / "ledger-student", dtype="float32", batch_rows=8
    )
    prompts = PromptBatch(
        prompt_id=("a", "b"), prompt_ids=(np.array([5, 6], np.int32), np.array([7], np.int32))
    )
    settings: dict[str, Any] = {"stop_ids": (1,), "seed": 4, "student_top_k": 6}
    short = engine.sample(prompts, SamplingSettings(window_tokens=4, **settings))
    whole = engine.sample(prompts, SamplingSettings(window_tokens=9, **settings))
    long = engine.extend(short, SamplingSettings(window_tokens=9, **settings))
    assert long.student_top_ids is not None
    assert whole.student_top_ids is not None
    for row, ids in enumerate(long.completion_ids):
        assert long.student_top_ids[row].shape == (len(ids), 6)
        np.testing.assert_array_equal(
            np.sort(long.student_top_ids[row]), np.sort(whole.student_top_ids[row])
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollouts.student_top_k=607",), "student_top_k is 607 but the teacher has 606 tokens"),
        (
            ("rollouts.student_top_k=4", "scores.codec={kind: sampled}"),
            "student_top_k is 4 with scores.codec sampled",
        ),
        (
            ("rollouts.student_top_k=4", "scores.alignment={kind: bytes}"),
            "scores.alignment is set with rollouts.student_top_k 4",
        ),
        (("rollouts.student_top_k=-1",), "student_top_k"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_setup(small_config(tmp_path, *overrides))


def test_exported_unions_come_back_as_they_were(small_runs: SmallRuns, tmp_path: Path) -> None:
    folder = small_runs(*UNION)
    summary = RunFolder(folder / "run").summary()
    assert summary is not None
    store = Store(str(folder / "store"))
    scores = store.by_fingerprint("scores", summary.caches[0][0].scores)
    export_scores(store, scores, tmp_path / "out", form="parquet")
    target = Store(str(tmp_path / "store"))
    found = import_scores(tmp_path / "out", target, ExactCodec(dtype="float32"))
    old = open_scores(folder / "store" / scores.name)
    new = open_scores(tmp_path / "store" / found.name)
    assert len(old) == len(new)
    for number in range(len(old)):
        for name in ("teacher_top_logprobs", "teacher_tail_logprobs"):
            width = min(each[number].teacher_top_ids.shape[1] for each in (old, new))
            mine, other = (getattr(each[number], name) for each in (old, new))
            mine, other = (v if v.ndim == 1 else v[:, :width] for v in (mine, other))
            np.testing.assert_allclose(np.exp(mine), np.exp(other), rtol=1e-6)


def test_a_store_of_scores_is_planned_with_the_students_ids(tmp_path: Path) -> None:
    from pipeline.estimate.sizes import rollouts_sizes, scores_sizes

    plain, union = small_config(tmp_path), small_config(tmp_path, *UNION)
    sizes = [scores_sizes(each, forced=1, vocabulary=606, width=96) for each in (plain, union)]
    assert sizes[1].per_completion_token - sizes[0].per_completion_token == 5 * (4 + 2)
    own = rollouts_sizes(student_top_k=5, vocabulary=606)
    assert own.per_completion_token - rollouts_sizes().per_completion_token == 10
