"""A teacher with another tokenizer: its scores as the student's, training on them, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.cross_tokenizer.aligner import Aligner
from opd_stream.cross_tokenizer.byte_tokenizer import ByteTokenizer
from opd_stream.engines import open_engine
from opd_stream.engines.base import ScoringSettings
from opd_stream.store.codecs import CompactCodec, ExactCodec, decode_scores, encode_scores
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.types import RolloutBatch, ScoreBatch
from tests.conftest import MODELS
from tests.tiny_tokenizers import byte_level, metaspace, permuted

TEACHER = MODELS / "ledger-teacher"
TEXTS = (" Monday: 12 coins", " 7 of them to Ben.", "naïve 😀")
EOS = 1


def rollouts(tokenizer: ByteTokenizer, texts: tuple[str, ...] = TEXTS) -> RolloutBatch:
    """The texts as the tokenizer writes them; the last one is cut by its window."""
    prompt = tokenizer.read("What is left?").ids
    ids = [tokenizer.read(text).ids for text in texts]
    ids = [np.append(row, EOS) for row in ids[:-1]] + ids[-1:]
    count = len(texts)
    return RolloutBatch(
        prompt_id=tuple(f"p{n}" for n in range(count)),
        sample_index=np.zeros(count, np.int32),
        prompt_ids=(prompt,) * count,
        completion_ids=tuple(ids),
        behavior_logprobs=tuple(np.full(len(row), -1.5, np.float32) for row in ids),
        finish_reason=(*["stop"] * (count - 1), "length"),  # pyright: ignore[reportArgumentType]
    )


def aligner(student: Any, teacher: Any, batch: RolloutBatch, **settings: Any) -> Aligner:
    one, other = ByteTokenizer(student, "student"), ByteTokenizer(teacher, "teacher")
    return Aligner(
        one,
        other,
        vocab_size=len(other.pieces) + 5,
        student_vocabulary=10**6,
        student_stops=(EOS,),
        teacher_stops=(teacher.eos_token_id,),
        max_chunk_tokens=settings.get("max_chunk_tokens", 6),
    )


def prompts_of(made: Aligner, batch: RolloutBatch) -> dict[str, Any]:
    """In the teacher's tokens, by id."""
    return {name: made.teacher.read("What is left?").ids for name in batch.prompt_id}


def random_scores(
    batch: RolloutBatch, vocab: int, top_k: int, asked: tuple[int, ...]
) -> ScoreBatch:
    """What a teacher of random distributions would answer."""
    random = np.random.default_rng(5)
    columns: list[tuple[Any, ...]] = []
    for ids in batch.completion_ids:
        dense = torch.log_softmax(torch.from_numpy(random.normal(0, 2, (len(ids), vocab))), 1)
        top = dense.topk(top_k, dim=1)
        tail = torch.log1p(-top.values.exp().sum(1))
        drawn = dense.numpy()[np.arange(len(ids)), ids]
        columns.append(
            (drawn, top.indices.numpy(), top.values.numpy(), tail.numpy(), dense.numpy()[:, asked])
        )
    single = [tuple(row[n].astype(np.float32) for row in columns) for n in range(5)]
    ids = tuple(row[1].astype(np.int32) for row in columns)
    return ScoreBatch(
        teacher_logprobs=single[0],
        teacher_top_ids=ids,
        teacher_top_logprobs=single[2],
        teacher_tail_logprobs=single[3],
        teacher_forced_logprobs=single[4],
        refused={},
    )


def crossed(top_k: int = 12, **settings: Any) -> tuple[RolloutBatch, Any, ScoreBatch, ScoreBatch]:
    """Rollouts of one tokenizer with the scores of a random teacher that has another."""
    student, teacher = open_tokenizer(TEACHER), byte_level(420)
    batch = rollouts(ByteTokenizer(student, "student"))
    made = aligner(student, teacher, batch, **settings)
    reading = made.read(batch, prompts_of(made, batch))
    scored = random_scores(reading.batch, len(teacher) + 5, top_k, made.asked_ids((EOS,)))
    return batch, reading, scored, made.scores(batch, reading, scored, (EOS,))


@pytest.mark.parametrize("top_k", [1, 8])
def test_the_same_tokenizer_gives_the_ordinary_scores(top_k: int) -> None:
    tokenizer = open_tokenizer(TEACHER)
    batch = rollouts(ByteTokenizer(tokenizer, "both"), (*TEXTS[:2], " On Monday"))
    made = aligner(tokenizer, tokenizer, batch)
    engine = open_engine(engine="transformers", folder=TEACHER, dtype="float32", batch_rows=8)
    ordinary = engine.score(batch, ScoringSettings(top_k=top_k, forced_ids=(0, EOS)))
    reading = made.read(batch, prompts_of(made, batch))
    assert made.asked_ids((0, EOS)) == (0, EOS)
    read = engine.score(reading.batch, ScoringSettings(top_k=top_k, forced_ids=(0, EOS)))
    found = made.scores(batch, reading, read, (0, EOS))
    for name in (
        "teacher_logprobs",
        "teacher_top_ids",
        "teacher_top_logprobs",
        "teacher_tail_logprobs",
        "teacher_forced_logprobs",
    ):
        for mine, theirs in zip(getattr(found, name), getattr(ordinary, name), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert found.same_tokens is not None
    assert all(row.all() for row in found.same_tokens)


def test_a_teacher_under_other_ids_gives_the_same_scores(tmp_path: Path) -> None:
    folder = permuted(TEACHER, tmp_path / "teacher")
    student, teacher = open_tokenizer(TEACHER), open_tokenizer(folder)
    batch = rollouts(ByteTokenizer(student, "student"), (*TEXTS[:2], " On Monday"))
    made = aligner(student, teacher, batch)
    reading, asked = made.read(batch, prompts_of(made, batch)), made.asked_ids((0, EOS))
    assert asked != (0, EOS)
    settings = {"engine": "transformers", "dtype": "float32", "batch_rows": 8, "vllm": {}}
    ordinary = open_engine(folder=TEACHER, **settings).score(
        batch, ScoringSettings(top_k=8, forced_ids=(0, EOS))
    )
    read = open_engine(folder=folder, **settings).score(
        reading.batch, ScoringSettings(top_k=8, forced_ids=asked)
    )
    found = made.scores(batch, reading, read, (0, EOS))
    for row in range(len(batch)):
        np.testing.assert_array_equal(found.teacher_top_ids[row], ordinary.teacher_top_ids[row])
        for name in ("logprobs", "top_logprobs", "tail_logprobs", "forced_logprobs"):
            mine, theirs = (getattr(side, f"teacher_{name}")[row] for side in (found, ordinary))
            np.testing.assert_allclose(mine, theirs, atol=1e-4, err_msg=name)


def test_chunk_sums_are_the_teachers() -> None:
    _, reading, scored, found = crossed()
    assert found.chunk_ids is not None
    several = 0
    for row, alignment in enumerate(reading.alignments):
        for chunk in range(len(alignment.trains)):
            mine = alignment.student_chunk == chunk
            theirs = np.flatnonzero(alignment.teacher_chunk == chunk)
            total = scored.teacher_logprobs[row][theirs].sum()
            shares = found.teacher_logprobs[row][: len(mine)][mine]
            assert shares.sum() == pytest.approx(total, abs=1e-5)
            several += len(shares) > 1
    assert several > 2


def test_candidates_are_the_teachers_by_their_bytes() -> None:
    _, reading, scored, found = crossed(top_k=60)
    student = ByteTokenizer(open_tokenizer(TEACHER), "student")
    teacher = ByteTokenizer(byte_level(420), "teacher")
    assert found.same_tokens is not None
    checked = 0
    for row, alignment in enumerate(reading.alignments):
        mass = np.exp(found.teacher_top_logprobs[row].astype(float)).sum(1)
        whole = mass + np.exp(found.teacher_tail_logprobs[row].astype(float))
        np.testing.assert_allclose(whole, 1, atol=1e-5)
        for place, same in enumerate(found.same_tokens[row].tolist()):
            kept = found.teacher_top_logprobs[row][place] > -np.inf
            assert kept.any() == same
            if not same or place == len(alignment.same):
                continue
            there = alignment.same[place]
            told = dict(
                zip(
                    scored.teacher_top_ids[row][there].tolist(),
                    scored.teacher_top_logprobs[row][there].tolist(),
                    strict=True,
                )
            )
            spelled = {
                teacher.bytes_of[n]: value for n, value in told.items() if n in teacher.bytes_of
            }
            for each, value in zip(
                found.teacher_top_ids[row][place][kept].tolist(),
                found.teacher_top_logprobs[row][place][kept].tolist(),
                strict=True,
            ):
                if each in student.bytes_of:
                    assert spelled[student.bytes_of[each]] == pytest.approx(value)
                    checked += 1
            known = set(student.bytes_of.values())
            assert sum(part in known for part in spelled) <= kept.sum()
    assert checked > 100


def test_two_ids_of_the_same_bytes_are_one_candidate() -> None:
    student, teacher = open_tokenizer(TEACHER), metaspace()
    batch = rollouts(ByteTokenizer(student, "student"))
    made = aligner(student, teacher, batch)
    reading = made.read(batch, prompts_of(made, batch))
    scored = random_scores(reading.batch, len(teacher) + 5, 300, made.asked_ids((EOS,)))
    found = made.scores(batch, reading, scored, (EOS,))
    kept = 0
    for ids, top in zip(found.teacher_top_ids, found.teacher_top_logprobs, strict=True):
        for position, logprobs in zip(ids, top, strict=True):
            there = position[logprobs > -np.inf].tolist()
            assert len(there) == len(set(there))
            kept += len(there)
    assert kept
    tails = np.concatenate(found.teacher_tail_logprobs)
    mass = np.exp(np.concatenate(found.teacher_top_logprobs).astype(float)).sum(1)
    np.testing.assert_allclose(mass + np.exp(tails), 1, atol=1e-5)


def test_stopping_is_one_outcome_after_the_last_byte() -> None:
    batch, reading, scored, found = crossed()
    for row in (0, 1):
        assert reading.batch.completion_ids[row][-1] == byte_level(420).eos_token_id
        event = scored.teacher_forced_logprobs[row][-1, 0]
        assert found.teacher_logprobs[row][-1] == event
        assert found.teacher_forced_logprobs[row][-1, 0] == event
        assert found.same_tokens is not None
        assert found.same_tokens[row][-1]
    assert len(reading.batch.completion_ids[2]) == len(reading.alignments[2].teacher_ids)
    assert batch.finish_reason[2] == "length"


def test_several_terminators_are_summed_in_candidates_and_forced_ids() -> None:
    student, teacher = open_tokenizer(TEACHER), byte_level(420, specials=("<end>", "<eos>"))
    batch = rollouts(ByteTokenizer(student, "student"))
    one, other = ByteTokenizer(student, "student"), ByteTokenizer(teacher, "teacher")
    made = Aligner(
        one,
        other,
        vocab_size=len(teacher),
        student_vocabulary=10**6,
        student_stops=(EOS,),
        teacher_stops=(0, 1),
        max_chunk_tokens=6,
    )
    reading, asked = made.read(batch, prompts_of(made, batch)), made.asked_ids((EOS,))
    assert asked == (0, 1)
    scored = random_scores(reading.batch, len(teacher), len(teacher) // 2, asked)
    found = made.scores(batch, reading, scored, (EOS,))
    stops = 0
    for row in range(3):
        top, ids = found.teacher_top_logprobs[row], found.teacher_top_ids[row]
        whole = np.exp(top.astype(float)).sum(1) + np.exp(found.teacher_tail_logprobs[row])
        np.testing.assert_allclose(whole, 1, atol=1e-5)
        places = np.argwhere((ids == EOS) & (top > -np.inf))
        for place, column in places:
            event = found.teacher_forced_logprobs[row][place, 0]
            assert top[place, column] == event
            stops += 1
        if batch.finish_reason[row] == "stop":
            last = np.logaddexp.reduce(scored.teacher_forced_logprobs[row][-1])
            assert found.teacher_logprobs[row][-1] == pytest.approx(last)
    assert stops > 3


@pytest.mark.parametrize("codec", [ExactCodec(), CompactCodec(mass=0.9)])
def test_codecs_keep_chunks(codec: Any) -> None:
    batch, _, _, found = crossed()
    table, _ = encode_scores(codec, found, batch)
    block = decode_scores(table.to_batches()[0])
    assert block.chunk_ids is not None
    assert found.chunk_ids is not None
    np.testing.assert_array_equal(block.chunk_ids, np.concatenate(found.chunk_ids))
    np.testing.assert_array_equal(block.same_tokens, np.concatenate(found.same_tokens or ()))
    forced = np.concatenate(found.teacher_forced_logprobs)
    np.testing.assert_array_equal(np.isinf(block.teacher_forced_logprobs), np.isinf(forced))
