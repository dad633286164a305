"""What the candidates of a cache see of the distance between student and teacher."""

import json

import numpy as np
import pytest

from opd_stream.coverage import (
    Support,
    is_low,
    least_supports,
    measured_coverage,
    support_shares,
)
from opd_stream.drift import NAMES
from opd_stream.outcome import Coverage
from opd_stream.store.inventory import coverage_of
from opd_stream.store.store import Store
from pipeline.accounting import uncovered_line
from pipeline.run_folder import RunFolder
from tests.conftest import SmallRuns, small_config

VOCABULARY = 40


def distributions(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    teacher = random.normal(size=(tokens, VOCABULARY)) * 2
    student = teacher + random.normal(size=(tokens, VOCABULARY))
    return tuple(  # pyright: ignore[reportReturnType]
        each - np.log(np.exp(each).sum(1, keepdims=True)) for each in (student, teacher)
    )


def test_a_whole_support_sees_everything_and_a_larger_one_more() -> None:
    student, teacher = distributions(30)
    supports = [Support(2), Support(4), Support(4, 3), Support(VOCABULARY), Support(0, VOCABULARY)]
    two, four, union, *whole = support_shares(student, teacher, supports)
    assert two.share < four.share < union.share < 1
    assert all(each.share == pytest.approx(1) for each in whole)
    assert 4 < union.ids < 7
    full = (np.exp(student) * (student - teacher)).sum(1)
    top = np.argsort(-teacher, axis=1)[:, :2]
    p, q = (np.take_along_axis(np.exp(each), top, 1) for each in (student, teacher))
    rest = 1 - p.sum(1), 1 - q.sum(1)
    bucket = (p * np.log(p / q)).sum(1) + rest[0] * np.log(rest[0] / rest[1])
    assert two.share == pytest.approx(bucket.sum() / full.sum())
    assert two.student_mass == pytest.approx(p.sum(1).mean())
    assert two.teacher_mass == pytest.approx(q.sum(1).mean())


def test_supports_wider_than_the_vocabulary_are_left_out() -> None:
    shares = support_shares(*distributions(3), [Support(2), Support(VOCABULARY + 1)])
    assert [each.top_k for each in shares] == [2]


def test_the_smallest_support_of_each_kind_that_sees_enough() -> None:
    shares = support_shares(
        *distributions(50),
        [Support(n) for n in (1, 12, 30)] + [Support(0, 20), Support(2, 1), Support(10, 10)],
    )
    alone, union = least_supports(shares, 0.9)
    assert alone.share >= 0.9
    assert not alone.student_top_k
    assert union.share >= 0.9
    assert (union.top_k, union.student_top_k) == (10, 10)
    assert least_supports(shares, 1.1) == []


def sums(tokens: float, seen: float, unseen: float) -> dict[str, float]:
    known = {"tokens": tokens, "seen_kl": seen, "unseen_kl": unseen}
    known |= {"student_top_mass": 0.7 * tokens, "teacher_top_mass": 0.95 * tokens}
    return dict.fromkeys(NAMES, 0.0) | known


def test_the_share_is_a_ratio_of_sums_with_the_error_of_its_rows() -> None:
    rows = [sums(10, 4, 1), sums(20, 9, 6)]
    found = measured_coverage(rows, is_plain=True)
    assert found is not None
    assert found.share == pytest.approx(13 / 20)
    assert found.reverse_kl == pytest.approx(20 / 30)
    assert found.error is not None
    assert found.error > 0
    assert (found.tokens, found.student_mass) == (30, pytest.approx(0.7))
    tempered = measured_coverage(rows, is_plain=False)
    assert tempered is not None
    assert (tempered.share, tempered.teacher_mass) == (None, pytest.approx(0.95))
    assert measured_coverage([], is_plain=True) is None
    assert measured_coverage([sums(10, 0, 0)], is_plain=True) is None


@pytest.mark.parametrize(
    ("share", "error", "mass", "expected"),
    [
        (0.8, 0.01, 0.95, True),
        (0.88, 0.02, 0.95, False),
        (0.95, 0.01, 0.8, True),
        (None, None, 0.95, False),
    ],
)
def test_what_is_low(share: float | None, error: float | None, mass: float, expected: bool) -> None:
    found = Coverage(tokens=9, student_mass=mass, teacher_mass=0.99, share=share, error=error)
    assert is_low(found) == expected


def test_a_run_says_what_its_candidates_see(small_runs: SmallRuns) -> None:
    """Few candidates see part of the distance; all of them see it, whatever was drawn."""
    found = {}
    for top_k in (4, 600):
        folder = small_runs() if top_k == 4 else small_runs("scores.top_k=600")
        report = RunFolder(folder / "run").report(0)
        assert report is not None
        assert report.coverage is not None
        found[top_k] = report
    few, all_ids = found[4].coverage, found[600].coverage
    assert few is not None
    assert all_ids is not None
    assert few.share is not None
    assert few.error is not None
    assert few.share < 1
    assert all_ids.share == pytest.approx(1, abs=1e-3)
    assert few.reverse_kl == pytest.approx(all_ids.reverse_kl, abs=4 * few.error)
    config = small_config(folder)
    assert not list(uncovered_line(found[600], config))
    low = found[4].model_copy(
        update={"coverage": Coverage(tokens=9, student_mass=0.5, teacher_mass=0.9, share=0.5)}
    )
    (line,) = uncovered_line(low, config)
    assert "see 50%" in line
    assert "doctor" in line
    replays = config.model_copy(update={"replay": object()})
    (line,) = uncovered_line(low, replays)
    assert "train on a cache with more candidates" in line
    assert "doctor" not in line
    store = Store(str(folder / "store"))
    scores = store.by_fingerprint("scores", found[600].caches[0].scores)
    assert coverage_of(store, scores) == found[600].coverage
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"seen_kl", "unseen_kl"} <= set(json.loads(lines[0]))
