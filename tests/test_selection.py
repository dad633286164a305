"""Tokens that train alone: by a figure of each, and by their place."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.batches import collate
from opd_stream.config_file import load_config
from opd_stream.drift import named
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket
from opd_stream.store.reader import ScoredRow
from opd_stream.weighting import (
    Segment,
    TokenSelection,
    Weighting,
    largest_of_rows,
    trained_mask,
)
from pipeline.caches import check_own
from tests.test_guards import HIDDEN, ROWS, VOCABULARY

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

torch.manual_seed(1)
TABLE, HEAD = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, HIDDEN)


def gradient(
    parts: list[list[ScoredRow]], select: TokenSelection | None, segment: Segment | None = None
) -> torch.Tensor:
    """Of the head over the micro-batches of a step, normalised as the training step does."""
    weight = HEAD.clone().requires_grad_()
    rows = [row for part in parts for row in part]
    tokens = sum(int(trained_mask(row, 9, (), segment).sum()) for row in rows)
    drift_weight = 0.0
    for part in parts:
        batch = collate(part, window_tokens=9, tokens_of_step=tokens, segment=segment)
        weighting = None if select is None else Weighting(select=select)
        found = batch_loss(
            TABLE[batch.input_ids_BL],
            OutputHead(weight_VH=weight),
            batch,
            (Bucket(),),
            merge_terminators=False,
            weighting=weighting,
        )
        found.loss.backward()
        drift_weight += named(found.sums)["drift_weight"]
    assert weight.grad is not None
    return weight.grad / (drift_weight / max(tokens, 1))


def figure(row: ScoredRow, by: str) -> np.ndarray:
    """A figure of each token, in float64 from dense distributions."""
    before = [row.prompt_ids[-1], *row.completion_ids[:-1]]
    student = (TABLE[before].double() @ HEAD.double().T).log_softmax(1)
    teacher = torch.tensor(row.teacher_top_logprobs).double()
    ids = torch.tensor(row.teacher_top_ids.astype(np.int64))
    own = student.gather(1, ids)
    p, q = (torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).log()], 1) for x in (own, teacher))
    found = {
        "kl": (p.exp() * (p - q)).sum(1),
        "student_entropy": -(student.exp() * student).sum(1),
        "teacher_entropy": -(q.exp() * q).sum(1),
    }
    return found[by].numpy()


@pytest.mark.parametrize("by", ["kl", "student_entropy", "teacher_entropy"])
def test_the_chosen_tokens_are_all_that_trains(by: str) -> None:
    """As if a loss mask had left the others out, in whatever micro-batches."""
    chosen: list[ScoredRow] = []
    for row in ROWS:
        values = figure(row, by)
        mask = np.zeros(len(values), np.bool_)
        mask[np.argsort(-values)[: int(np.ceil(0.4 * len(values)))]] = True
        chosen.append(replace(row, loss_mask=mask))
    select = TokenSelection.model_validate({"by": by, "share": 0.4})
    expected = gradient([chosen], None)
    torch.testing.assert_close(gradient([list(ROWS)], select), expected, rtol=1e-4, atol=1e-6)
    parts = [[ROWS[2]], [ROWS[0], ROWS[3]], [ROWS[1]]]
    torch.testing.assert_close(gradient(parts, select), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected, gradient([list(ROWS)], None), rtol=0.1)


def test_a_share_of_all_changes_no_bit() -> None:
    every = TokenSelection(by="kl", share=1.0)
    assert torch.equal(gradient([list(ROWS)], every), gradient([list(ROWS)], None))


def test_the_largest_of_each_row_are_rounded_up_and_ties_go_to_the_earlier() -> None:
    row_N = torch.tensor([0] * 30 + [1] * 3 + [2])
    values = torch.cat([torch.arange(30.0), torch.zeros(3), torch.ones(1)])
    found = largest_of_rows(values, row_N, share=0.1)
    assert found.nonzero()[:, 0].tolist() == [27, 28, 29, 30, 33]
    assert len(largest_of_rows(values[:0], row_N[:0], share=0.1)) == 0


def test_a_segment_trains_what_a_loss_mask_of_its_places_would() -> None:
    segment, masked = Segment(first=2, end=5), list[ScoredRow]()
    for row in ROWS:
        places = np.arange(len(row.completion_ids))
        masked.append(replace(row, loss_mask=(places >= 2) & (places < 5)))
    expected = gradient([masked], None)
    found = gradient([[ROWS[0], ROWS[1]], [ROWS[2], ROWS[3]]], None, segment)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    whole = gradient([list(ROWS)], None, Segment(first=0, end=1000))
    assert torch.equal(whole, gradient([list(ROWS)], None))


def test_rollouts_that_end_before_a_segment_train_nothing() -> None:
    segment = Segment(first=5, end=9)
    alone = gradient([[ROWS[1], ROWS[3]]], None, segment)
    with_short = gradient([[ROWS[0], ROWS[2]], [ROWS[1], ROWS[3]]], None, segment)
    torch.testing.assert_close(with_short, alone)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"codec": {"kind": "sampled"}}, "s of run x cannot choose tokens: train.select.by is kl"),
        (
            {"codec": {"kind": "exact"}, "alignment": {}},
            "train.select is set with scores.alignment",
        ),
    ],
)
def test_a_replay_refuses_scores_that_cannot_choose(settings: dict[str, Any], line: str) -> None:
    config = load_config(QUICKSTART, ["train.select={by: kl}"])
    rollouts = SimpleNamespace(artifact=SimpleNamespace(recipe=SimpleNamespace(settings={})))
    scores = SimpleNamespace(
        artifact=SimpleNamespace(recipe=SimpleNamespace(settings=settings), name="s")
    )
    cache: Any = SimpleNamespace(rollouts=rollouts, scores=scores)
    with pytest.raises(UserError, match=line):
        check_own(config, cache, "run x")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("train.select={by: kl}", "scores.alignment={kind: bytes}"), "train.select is set with"),
        (
            (
                "train.select={by: kl}",
                "scores.codec={kind: sampled, draws: 8}",
                "train.objective={kind: sampled_pg}",
            ),
            "train.select.by is kl with scores.codec sampled",
        ),
        (("train.segment={first: 8, end: 8}",), "train.segment ends at 8 and begins at 8"),
        (("train.segment={first: 64, end: 80}",), "window of step 0 has 64 tokens"),
        (
            (
                "train.segment={end: 80}",
                "rollouts.window={kind: adaptive, candidates: [8], max_window_tokens: 16}",
            ),
            "train.segment is set with window adaptive",
        ),
        (
            ("train.segment={end: 8}", "prompts.solutions=true", "rollouts.prefix_tokens=8"),
            "ends at 8 and rollouts.prefix_tokens is 8",
        ),
        (
            ("train.select={by: kl}", "prompts.solutions=true", "rollouts.given_share=1"),
            "given_share is 1 with train.select",
        ),
    ],
)
def test_choices_that_cannot_be_are_refused(settings: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_config(QUICKSTART, list(settings))
