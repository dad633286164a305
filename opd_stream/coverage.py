"""How much of the distance between two models the candidates of a cache see.

A divergence over some ids and one outcome for all others is at most the full one. Here both whole
distributions of some tokens are known, so the share that a support sees is exact for each, and the
supports that a cache might have had are compared on the same tokens.

Shapes: N tokens, V vocabulary, C supports.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_stream.drift import means, ratio_error
from opd_stream.outcome import Coverage
from opd_stream.section import Record

ENOUGH = 0.9  # of the reverse KL, or of a side's mass; below, a line says so
NOTHING = 1e-7  # nats a token; below, there is nothing to see
SMALLEST_MASS = 1e-12  # of a tail in float64


class Support(NamedTuple):
    """Candidates of a position."""

    top_k: int  # the teacher's most probable ids
    student_top_k: int = 0  # and the student's


SUPPORTS = (
    *(Support(k) for k in (8, 16, 32, 64, 128, 256, 512, 1024)),
    *(Support(0, k) for k in (32, 128)),
    *(Support(32, k) for k in (16, 32, 64, 128, 256)),
    *(Support(64, k) for k in (64, 128, 256)),
    *(Support(128, k) for k in (128, 256, 512)),
    *(Support(256, k) for k in (256, 512, 1024)),
)


class SupportShare(Record):
    """What one support sees, as means over tokens."""

    top_k: int
    student_top_k: int
    ids: float  # in the union
    share: float  # of the full reverse KL, a ratio of means
    error: float  # its standard error over tokens
    student_mass: float
    teacher_mass: float


def support_shares(
    student_NV: NDArray[np.floating[Any]],
    teacher_NV: NDArray[np.floating[Any]],
    supports: Sequence[Support] = SUPPORTS,
) -> list[SupportShare]:
    """What each support sees of KL(student || teacher); those wider than V are left out.

    Args:
        student_NV: log-probabilities, whole distributions.
        teacher_NV: the same of the teacher at the same tokens.
        supports: candidates to compare.
    """
    vocabulary = student_NV.shape[1]
    fitting = [each for each in supports if max(each) <= vocabulary]
    widest = max(max(each) for each in fitting)
    found_NC4: list[list[tuple[float, float, float, float]]] = []
    full_N: list[float] = []
    for student_V, teacher_V in zip(student_NV, teacher_NV, strict=True):
        log_p, log_q = student_V.astype(np.float64), teacher_V.astype(np.float64)
        p, q = np.exp(log_p), np.exp(log_q)
        parts = p * (log_p - log_q)
        own, theirs = _first(log_p, widest), _first(log_q, widest)
        full_N.append(float(parts.sum()))
        found_NC4.append([_seen(p, q, parts, theirs, own, each) for each in fitting])
    found, full = np.array(found_NC4), np.array(full_N)
    is_apart = float(full.sum()) > NOTHING * len(full)
    return [
        SupportShare(
            top_k=support.top_k,
            student_top_k=support.student_top_k,
            ids=float(of[:, 3].mean()),
            share=float(of[:, 0].sum() / full.sum()) if is_apart else 1.0,
            error=ratio_error(of[:, 0].tolist(), full.tolist()) if is_apart else 0.0,
            student_mass=float(of[:, 1].mean()),
            teacher_mass=float(of[:, 2].mean()),
        )
        for support, of in zip(fitting, found.transpose(1, 0, 2), strict=True)
    ]


def least_supports(shares: Sequence[SupportShare], enough: float = ENOUGH) -> list[SupportShare]:
    """The K alone and the union of fewest ids that see enough; either may be missing."""
    found: list[SupportShare] = []
    for is_union in (False, True):
        those = [
            each
            for each in shares
            if each.share >= enough and each.top_k and bool(each.student_top_k) == is_union
        ]
        found += sorted(those, key=lambda each: each.ids)[:1]
    return found


def measured_coverage(rows: Sequence[Mapping[str, float]], *, is_plain: bool) -> Coverage | None:
    """What the candidates hold and see, from the sums of some rows (`opd_stream.drift.NAMES`).

    Args:
        rows: one mapping a row.
        is_plain: whether the rows were drawn at temperature 1, so that a drawn token is an
            estimate of what the candidates leave out.

    Returns:
        None: the rows hold no token, or no ranked candidates.
    """
    total = {name: sum(row[name] for row in rows) for name in rows[0]} if rows else {}
    if not total.get("tokens") or not total["seen_kl"]:
        return None
    mean = means(total)
    coverage = Coverage(
        tokens=int(total["tokens"]),
        student_mass=mean["student_top_mass"],
        teacher_mass=mean["teacher_top_mass"],
    )
    seen = [row["seen_kl"] for row in rows]
    full = [row["seen_kl"] + row["unseen_kl"] for row in rows]
    if not is_plain or sum(full) <= 0:
        return coverage
    return coverage.model_copy(
        update={
            "reverse_kl": sum(full) / total["tokens"],
            "share": sum(seen) / sum(full),
            "error": ratio_error(seen, full),
        }
    )


def is_low(coverage: Coverage) -> bool:
    """Whether less than `ENOUGH` is held, or is seen beyond the error of the measurement."""
    share = None if coverage.share is None else coverage.share + 2 * (coverage.error or 0.0)
    found = (share, coverage.student_mass, coverage.teacher_mass)
    return any(each is not None and each < ENOUGH for each in found)


SEE_MORE = (
    "raise scores.top_k or rollouts.student_top_k (doctor says to what), or use codec hidden or "
    "objective hybrid"
)
SEE_MORE_OF_A_CACHE = "train on a cache with more candidates, or use objective hybrid"


def coverage_text(found: Coverage, remedy: str = SEE_MORE) -> str:
    """What the candidates see and hold, as the end of a sentence that begins with them."""
    seen = ""
    if found.share is not None:
        seen = f"see {found.share:.0%} (± {found.error or 0:.0%}) of the reverse KL and "
    return (
        f"{seen}hold {found.student_mass:.0%} of the student's mass, {found.teacher_mass:.0%} of "
        f"the teacher's, on {found.tokens:,} tokens; {remedy}"
    )


def _first(logprobs_V: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` most probable ids, by rank."""
    some = np.argpartition(-logprobs_V, count - 1)[:count]
    return some[np.argsort(-logprobs_V[some], kind="stable")]


def _seen(
    p_V: NDArray[np.float64],
    q_V: NDArray[np.float64],
    parts_V: NDArray[np.float64],
    theirs: NDArray[np.int64],
    own: NDArray[np.int64],
    support: Support,
) -> tuple[float, float, float, float]:
    """KL over the support and one outcome for the rest, both masses, and how many ids."""
    ids = np.union1d(theirs[: support.top_k], own[: support.student_top_k])
    head_p, head_q = float(p_V[ids].sum()), float(q_V[ids].sum())
    rest_p, rest_q = (max(1 - head, SMALLEST_MASS) for head in (head_p, head_q))
    seen = float(parts_V[ids].sum()) + rest_p * float(np.log(rest_p / rest_q))
    return seen, head_p, head_q, float(len(ids))
