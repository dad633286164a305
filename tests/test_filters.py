"""Rollouts that are left out before the teacher reads them."""

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from opd_stream.engines.base import RowScores, score_batch
from opd_stream.errors import UserError
from opd_stream.filters import Keep, Reason, dropped_of, dropped_rows, dropped_text, repeated_tokens
from opd_stream.store.artifact import summed_counts
from opd_stream.store.codecs import (
    CompactCodec,
    ExactCodec,
    SampledCodec,
    checked_scores,
    encode_scores,
    scores_batch,
)
from opd_stream.store.reader import ScoredRows
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.types import FinishReason, RolloutBatch
from pipeline.estimate import estimate
from pipeline.run_folder import RunFolder
from stages.filtering import chosen_rows, in_places
from stages.step import Silent
from tests.conftest import MODELS, reports_of, run, small_config

SHORT = (
    "rollouts.window={kind: fixed, tokens: 12}",
    "rounds=1",
    "evaluation=null",
    "held_out_prompts=0",
    "staleness.max_epochs=1",
    "rollouts.samples_per_prompt=2",
)


def rollouts(*rows: tuple[str, list[int], FinishReason]) -> RolloutBatch:
    samples: list[int] = []
    for place, row in enumerate(rows):
        samples.append(sum(row[0] == other[0] for other in rows[:place]))
    return RolloutBatch(
        prompt_id=tuple(row[0] for row in rows),
        sample_index=np.array(samples, np.int32),
        prompt_ids=tuple(np.array([5, 6]) for _ in rows),
        completion_ids=tuple(np.array(row[1]) for row in rows),
        behavior_logprobs=tuple(np.full(len(row[1]), -0.5, np.float32) for row in rows),
        finish_reason=tuple(row[2] for row in rows),
    )


FOUR = rollouts(
    ("a", [7, 8, 1], "stop"),
    ("a", [7, 8, 1], "stop"),
    ("b", [4] * 10, "length"),
    ("b", [1, 2, 3, 4, 5, 6], "length"),
)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(finish_reason="stop"), {2: "finish_reason", 3: "finish_reason"}),
        (Keep(min_tokens=6), {0: "short", 1: "short"}),
        (Keep(max_tokens=6), {2: "long"}),
        (Keep(max_repeated=0.5), {2: "repeated"}),
        (Keep(distinct=True), {1: "duplicate"}),
        (Keep(per_prompt=1), {1: "per_prompt", 3: "per_prompt"}),
        (Keep(max_tokens=6, per_prompt=1), {1: "per_prompt", 2: "long"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_first_condition_that_does_not_hold_is_the_reason(
    keep: Keep, expected: dict[int, str]
) -> None:
    assert dropped_rows(keep, FOUR) == expected


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("correct", {1: "verdict", 2: "unjudged", 3: "verdict"}),
        ("incorrect", {0: "verdict", 2: "unjudged"}),
        ("mixed", {2: "unjudged", 3: "verdict"}),
    ],
)
def test_a_verdict_keeps_right_or_wrong_or_both_of_a_mixed_prompt(
    verdict: str, expected: dict[int, str]
) -> None:
    judge = {"kind": "exact"}
    keep = Keep.model_validate({"judge": judge, "verdict": verdict})
    found = dropped_rows(keep, FOUR, lambda rows: [[True, False, None, False][n] for n in rows])
    assert found == expected


def test_a_judge_is_asked_of_nothing_that_is_left_out_already() -> None:
    asked: list[int] = []
    keep = Keep.model_validate({"judge": {"kind": "exact"}, "max_tokens": 6, "distinct": True})
    dropped_rows(keep, FOUR, lambda rows: asked.extend(rows) or [True for _ in rows])
    assert asked == [0, 3]


def test_repeated_tokens_are_those_that_end_a_stretch_seen_before() -> None:
    for ids in ([4] * 10, [1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3], [], [9, 1, 2, 3, 4, 8, 1, 2, 3, 4]):
        stretches = [tuple(ids[end - 4 : end]) for end in range(4, len(ids) + 1)]
        again = sum(each in stretches[:place] for place, each in enumerate(stretches))
        assert repeated_tokens(np.array(ids, np.int64)) == again


@pytest.mark.parametrize("codec", [ExactCodec(), CompactCodec(), SampledCodec(draws=2)])
@pytest.mark.parametrize("kept", [[1, 3], []])
def test_rows_without_scores_are_stored_and_read_with_their_reason(
    codec: ExactCodec | CompactCodec | SampledCodec, kept: list[int]
) -> None:
    def row(tokens: int) -> RowScores:
        half = np.full((tokens, 2), np.log(0.5), np.float32)
        ids = np.tile(np.array([3, 4], np.int32), (tokens, 1))
        return RowScores(half[:, :1], ids, half, np.full(tokens, -np.inf, np.float32), half[:, :1])

    part = chosen_rows(FOUR, kept)
    scored = score_batch((row(len(ids)) for ids in part.completion_ids), part)
    dropped: dict[int, Reason] = {n: "short" for n in range(4) if n not in kept}
    whole = in_places(scored, kept, dropped, states=None)
    table, _ = encode_scores(codec, whole, FOUR)
    tokens = np.array([len(ids) for ids in FOUR.completion_ids])
    checked_scores(table.to_batches()[0], tokens)
    read = scores_batch(table)
    assert sorted(read.refused) == sorted(dropped)
    assert all(reason.startswith("rollouts.keep: ") for reason in read.refused.values())
    for place, number in enumerate(kept):
        assert len(read.teacher_logprobs[number]) == len(part.completion_ids[place])


def even(completion: str, reference: str) -> bool:
    """A judge that finds about half of all completions right."""
    return crc32(completion.encode()) % 2 == 0


def test_a_run_scores_and_trains_the_rest_alone(tmp_path: Path) -> None:
    keep = "rollouts.keep={judge: {kind: 'tests.test_filters:even'}, min_tokens: 3}"
    said: list[str] = []

    class Heard(Silent):
        def warn(self, line: str) -> None:
            said.append(line)

    config = small_config(tmp_path, *SHORT, keep)
    planned = estimate(config, RunFolder(tmp_path / "run"))
    assert any("rollouts.keep leaves rollouts out" in note for note in planned.notes)
    summary = run(config, RunFolder(tmp_path / "run"), Heard())
    plain = small_config(tmp_path, *SHORT)
    run(plain, RunFolder(tmp_path / "plain"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    (whole,) = reports_of(RunFolder(tmp_path / "plain"))
    assert report["caches"][0]["rollouts"] == whole["caches"][0]["rollouts"]
    assert report["caches"][0]["scores"] != whole["caches"][0]["scores"]
    store = Store(config.store)
    cached = store.by_fingerprint("rollouts", report["caches"][0]["rollouts"])
    scores, all_scores = (
        store.by_fingerprint("scores", each["caches"][0]["scores"]) for each in (report, whole)
    )
    tokenizer = open_tokenizer(MODELS / "ledger-student")
    expected: list[str] = []
    for unit in cached.units():
        batch = rollouts_batch(cached.read_unit(unit))
        for row, ids in enumerate(batch.completion_ids):
            right = even(tokenizer.decode(ids, skip_special_tokens=True), "")
            if len(ids) >= 3 and right:
                expected.append(f"{batch.prompt_id[row]}/{batch.sample_index[row]}")
    rows, others = ScoredRows([(cached, scores)]), ScoredRows([(cached, all_scores)])
    found = {
        f"{row.prompt_id}/{row.sample_index}": row
        for row in map(rows.__getitem__, range(len(rows)))
    }
    assert sorted(found) == sorted(expected)
    assert 0 < len(found) < len(others)
    for number in range(len(others)):
        other = others[number]
        kept = found.get(f"{other.prompt_id}/{other.sample_index}")
        if kept is not None:
            np.testing.assert_allclose(kept.teacher_logprobs, other.teacher_logprobs, atol=1e-5)
    left_out = len(others) - len(found)
    assert sum(summary["dropped_rows"].values()) == left_out == sum(report["dropped_rows"].values())
    assert report["tokens"]["teacher_scored"] == sum(len(r.completion_ids) for r in found.values())
    assert any(f"rollouts.keep left out {left_out} rollouts" in line for line in said)
    counts = summed_counts(scores.commits().values())
    assert counts["refused_rows"] == 0
    assert dropped_text(dropped_of(counts)) == dropped_text(report["dropped_rows"])


def test_a_round_without_a_rollout_left_is_told_in_a_line(tmp_path: Path) -> None:
    keep = "rollouts.keep={min_tokens: 12, finish_reason: stop}"
    config = small_config(tmp_path, *SHORT, keep)
    with pytest.raises(UserError, match=r"left out 16 rollouts \(fin.* 16\); loosen") as caught:
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert "\n" not in str(caught.value)


def test_more_tokens_than_the_first_window_has_are_refused_with_the_config(tmp_path: Path) -> None:
    window = "rollouts.window={kind: linear, h0: 10, delta: 1, max_window_tokens: 99}"
    last = 10 + 4 - 1  # of the steps of round 0: 16 rows in batches of 4
    small_config(tmp_path, *SHORT, window, f"rollouts.keep={{min_tokens: {last}}}")
    with pytest.raises(UserError, match=rf"min_tokens is 14 and .* round 0 have {last} tokens"):
        small_config(tmp_path, *SHORT, window, f"rollouts.keep={{min_tokens: {last + 1}}}")


def test_a_whole_unit_may_be_left_out_of_hidden_states(tmp_path: Path) -> None:
    keep = "rollouts.keep={judge: {kind: 'tests.test_filters:even'}}"
    unit = ("prompts_per_unit=1", "rollouts.samples_per_prompt=1", "scores.codec={kind: hidden}")
    config = small_config(tmp_path, *SHORT, *unit, keep)
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert 0 < summary["dropped_rows"]["verdict"] < 8


def test_references_that_no_judge_can_read_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "2 + 3?"}\n' * 8)
    prompts = f"prompts={{kind: jsonl, path: {tmp_path / 'p.jsonl'}}}"
    config = small_config(tmp_path, *SHORT, prompts, "rollouts.keep={judge: {kind: math}}")
    with pytest.raises(UserError, match="none of 8 prompts has a reference answer"):
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert not list((tmp_path / "store").glob("rollouts/*"))


@pytest.mark.slow
def test_rows_that_are_continued_are_scored_whole(tmp_path: Path) -> None:
    """One that was cut, and so left out, may end in a later round."""
    window = "rollouts.window={kind: linear, h0: 8, delta: 2, every: 1, max_window_tokens: 24}"
    kept = ("staleness.max_policies=2", "staleness.policy_drift=5", "train.learning_rate=0.00001")
    keep = "rollouts.keep={judge: {kind: 'tests.test_filters:even'}}"
    config = small_config(tmp_path, *SHORT, "rounds=2", window, *kept, keep)
    run(config, RunFolder(tmp_path / "run"), Silent())
    reports, store = reports_of(RunFolder(tmp_path / "run")), Store(config.store)
    (extended,) = [c for c in reports[1]["caches"] if c["origin"] == "extended"]
    scores = store.by_fingerprint("scores", extended["scores"])
    assert "scores" not in scores.recipe.inputs
    counts = summed_counts(scores.commits().values())
    assert 0 < counts["dropped_verdict"] < counts["rows"]
    rows = ScoredRows([(store.by_fingerprint("rollouts", extended["rollouts"]), scores)])
    assert len(rows) == counts["rows"] - counts["dropped_verdict"]
    assert (
        sum(len(row.completion_ids) for row in map(rows.__getitem__, range(len(rows))))
        == (counts["completion_tokens"])
    )


def test_conditions_are_read_again_as_they_are_stored() -> None:
    """A run folder's config says every field, of a judge too where there is none."""
    keep = Keep(finish_reason="stop")
    assert Keep.model_validate(keep.model_dump(mode="json")) == keep
    with pytest.raises(ValueError, match=r"keep\.verdict is correct and nothing judges"):
        Keep.model_validate({"verdict": "correct"})
    with pytest.raises(ValueError, match=r"keep\.verdict is mixed and nothing judges"):
        Keep.model_validate({"finish_reason": "stop", "verdict": "mixed"})
