"""Style bias of a teacher on a fixed cache (Lightning OPD 2.0): what it says of anybody's text.

Where the teacher is not the model that taught the student, part of its disagreement with the
reference policy is manner: fixed words, fixed places. Two tables of mean disagreement, fitted on
other prompts, estimate that part: one by token id, one by place in the text and surprise of the
reference. Half their sum is taken from the teacher's log-probability.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleSettings:
    """How finely the tables look, and how soon they trust a group."""

    folds: int = 5
    position_bins: int = 20
    surprisal_bins: int = 10
    prior_tokens: float = 50.0  # a group of so many tokens is half its own mean


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleBias:
    """Bias of every row, and what is needed to correct other ids of its positions."""

    rows: tuple[NDArray[np.float64], ...]  # R x [T], nats, of the sampled token
    fold: NDArray[np.int64]  # [R]
    by_id: tuple[dict[int, float], ...]  # fold -> shrunk mean of each id seen in the others
    unseen: tuple[float, ...]  # fold -> what an id without a table entry gets


def style_bias(
    prompt_ids: Sequence[str],
    completion_ids: Sequence[NDArray[np.integer[Any]]],
    reference_logprobs: Sequence[NDArray[np.floating[Any]]],
    teacher_logprobs: Sequence[NDArray[np.floating[Any]]],
    settings: StyleSettings,
) -> StyleBias:
    """Cross-fitted bias: the rows of a fold get the tables of all other folds.

    Args:
        prompt_ids: of R rows; rows of one prompt share a fold.
        completion_ids: R x [T].
        reference_logprobs: R x [T], of the policy that wrote the rows, nats.
        teacher_logprobs: R x [T], nats.
        settings: folds, bins, shrinkage.

    Every row counts equally: its tokens weigh 1 / T.
    """
    lengths = np.array([len(ids) for ids in completion_ids])
    digests = [hashlib.sha256(prompt_id.encode()).digest() for prompt_id in prompt_ids]
    folds = [int.from_bytes(digest[:8], "big") % settings.folds for digest in digests]
    fold = np.array(folds, np.int64)
    id_N = np.concatenate([np.asarray(ids, np.int64) for ids in completion_ids])
    reference_N = np.concatenate(list(reference_logprobs)).astype(np.float64)
    difference_N = np.concatenate(list(teacher_logprobs)).astype(np.float64) - reference_N
    row_N = np.repeat(np.arange(len(lengths)), lengths)
    place_N: NDArray[np.int64] = np.concatenate([np.arange(int(n)) for n in lengths])
    weight_N = 1 / lengths[row_N]
    names, key_N = np.unique(id_N, return_inverse=True)
    position_N = place_N * settings.position_bins // lengths[row_N]
    edges = np.quantile(-reference_N, np.linspace(0, 1, settings.surprisal_bins + 1)[1:-1])
    cell_N = position_N * settings.surprisal_bins + np.searchsorted(edges, -reference_N)
    cells = settings.position_bins * settings.surprisal_bins
    bias_N = np.zeros(len(id_N))
    by_id: list[dict[int, float]] = []
    unseen: list[float] = []
    for number in range(settings.folds):
        own_N = fold[row_N] == number
        other_N = ~own_N
        fit = (difference_N[other_N], weight_N[other_N], settings.prior_tokens)
        ids, mean = _shrunk_means(key_N[other_N], len(names), *fit)
        places, _ = _shrunk_means(cell_N[other_N], cells, *fit)
        bias_N[own_N] = (ids[key_N[own_N]] + places[cell_N[own_N]]) / 2
        by_id.append(dict(zip(names.tolist(), ids.tolist(), strict=True)))
        unseen.append(mean)
    ends = np.cumsum(lengths)[:-1]
    return StyleBias(
        rows=tuple(np.split(bias_N, ends)), fold=fold, by_id=tuple(by_id), unseen=tuple(unseen)
    )


def _shrunk_means(
    key_N: NDArray[np.int64],
    groups: int,
    value_N: NDArray[np.float64],
    weight_N: NDArray[np.float64],
    prior: float,
) -> tuple[NDArray[np.float64], float]:
    """(n mean + n0 global mean) / (n + n0) of every group, and the global mean."""
    if not len(key_N):
        return np.zeros(groups), 0.0
    total = float((value_N * weight_N).sum() / weight_N.sum())
    count = np.bincount(key_N, minlength=groups)
    mass = np.bincount(key_N, weight_N, groups)
    mean = np.bincount(key_N, value_N * weight_N, groups) / np.where(mass > 0, mass, 1.0)
    return (count * mean + prior * total) / (count + prior), total
