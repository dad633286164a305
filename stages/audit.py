"""The audit of the adaptive window: do prefixes still point where full rollouts point?

Probes are unfinished rollouts of the round, continued to full length by the weights that wrote them
and scored like any other; nothing trains on them. Where the window cut too few, rollouts that ended
by themselves are full ones, and fill their places. The gradient of the objective that trains (or of
the sampled one) under the current weights is taken segment by segment on the last layers, and the
decision is the window until the next audit, or of the next round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from opd_stream.batches import Batch
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, layers_of, rows_hidden
from opd_stream.loss import batch_loss
from opd_stream.objectives import Objective, SampledPg
from opd_stream.outcome import WindowAudit
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.windows import (
    AdaptiveWindow,
    FixedWindow,
    WindowDecision,
    choose_window,
    fewest_groups,
    sketch,
)
from stages.prompts import probe_size
from stages.student_model import StudentModel
from stages.train_data import step_batches
from stages.train_job import TrainJob
from stages.train_state import Clock, load_weights

EPSILON = 1e-8  # of the adam metric

Groups = Sequence[Sequence[torch.nn.Parameter]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The full rollouts of a round's audits, and where they lie."""

    places: Sequence[tuple[ScoredRows, int]]

    def __len__(self) -> int:
        return len(self.places)

    def read(self) -> list[ScoredRow]:
        """The rollouts with their scores; no further draws, which continued ones do not have."""
        found = (rows[position] for rows, position in self.places)
        return [replace(row, candidate_ids=None) for row in found]


def open_probes(job: TrainJob, rows: ScoredRows) -> Probes | None:
    """What the round's audits read; None: it has none.

    Args:
        job: the round.
        rows: that it trains on.
    """
    settings = job.config.rollouts.window
    if not isinstance(settings, AdaptiveWindow):
        return None
    places: list[tuple[ScoredRows, int]] = []
    if job.probe is not None:
        store, (rollouts, scores) = job.store(), job.probe
        found = ScoredRows(
            [(store.by_fingerprint("rollouts", rollouts), store.by_fingerprint("scores", scores))]
        )
        places += [(found, position) for position in range(len(found))]
    if settings.audit_steps is not None and job.config.replay is None:
        given = job.plan().given
        units = rows.positions_by_unit().items()
        own = [n for (cache, _), positions in units if not given[cache] for n in positions]
        probe = {"rows": settings.probe_rows, "share": settings.probe_share}
        lacking = probe_size(len(own), probe, len(own)) - len(places)
        if lacking > 0:
            whole = [n for n in own if rows[n].finish_reason != "length"]
            random = np.random.default_rng([job.config.seed, job.round_index, len(whole)])
            places += [(rows, n) for n in random.permutation(whole)[:lacking].tolist()]
    return Probes(places=places) if places else None


def audit(
    job: TrainJob,
    probes: Probes,
    *,
    steps: int = 0,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, Any],
    earlier: WindowAudit | None,
    current: int,
) -> WindowAudit:
    """The decision, with its cosines and cost: a function of the probes and the weights.

    Args:
        job: the round.
        probes: of it.
        steps: of the round, done before.
        weights: that are trained, as they are now.
        moments: of the optimizer, as they are now; read by metric adam.
        earlier: the audit before, of this round or an earlier one.
        current: the window now.
    """
    settings, clock = job.config.rollouts.window, Clock()
    assert isinstance(settings, AdaptiveWindow)
    student = job.load_student()
    load_weights(student, weights)
    student = student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    layers, gap = settings.layers, None
    if layers is None and earlier is not None:
        layers, gap = earlier.layers, earlier.layer_gap
    is_first = settings.layers is None and earlier is None
    groups = parameter_groups(student, layers=layers)
    parts = _summed(job, probes, student, groups, moments)
    segments = [torch.cat(each) for each in parts]
    if is_first:
        count, gap = fewest_groups(parts)
        layers = None if count == len(groups) else count
    return WindowAudit(
        **dict(_decision(settings, segments, earlier, current)),
        probe_rows=len(probes),
        steps=steps,
        layers=layers,
        layer_gap=gap,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
    )


def _decision(
    settings: AdaptiveWindow,
    segments: Sequence[torch.Tensor],
    earlier: WindowAudit | None,
    current: int,
) -> WindowDecision:
    return choose_window(
        segments,
        settings.candidates,
        threshold=settings.threshold,
        fallback=settings.fallback_tokens,
        current=current if settings.hysteresis else None,
        earlier=() if earlier is None else earlier.cosines,
        smoothing=settings.smoothing,
    )


def _summed(
    job: TrainJob,
    probes: Probes,
    student: StudentModel,
    groups: Groups,
    moments: Mapping[str, Any],
) -> list[list[torch.Tensor]]:
    """Sketches of all probes: of each segment those of each group."""
    settings = job.config.rollouts.window
    assert isinstance(settings, AdaptiveWindow)
    whole = FixedWindow(tokens=settings.max_window_tokens)
    plan = replace(job.plan(), window=whole, given=(), staleness=(), weights=())
    rows, objectives, merge = probes.read(), (SampledPg(),), True
    if settings.objective == "trained":
        rows = [plan.used(row) for row in rows]
        objectives, merge = job.objectives(), job.config.train.guards.merge_terminators
    device = next(student.parameters()).device
    teacher = job.teacher(device, vocabulary=student.vocabulary)
    scales = _scales(student, groups, moments) if settings.metric == "adam" else None
    total: list[list[torch.Tensor]] = []
    for batch in step_batches(rows, plan, job.first_step):
        found = segment_sketches(
            student,
            batch.to(device),
            settings.candidates,
            groups,
            objectives=objectives,
            merge_terminators=merge,
            scales=scales,
            teacher=teacher,
        )
        total = total or [[torch.zeros_like(one) for one in parts] for parts in found]
        total = [
            [one + other for one, other in zip(so_far, parts, strict=True)]
            for so_far, parts in zip(total, found, strict=True)
        ]
    return total


def parameter_groups(student: StudentModel, *, layers: int | None) -> Groups:
    """Parameters whose gradients are compared; all others are frozen.

    Args:
        student: with adapters, these are all that it trains.
        layers: one group of the matrices of so many last layers that train any; None: a group for
            the matrices of each of these, the last layer first, and one for everything else that
            trains.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = (
        [p for p in layer.parameters() if p.requires_grad and p.ndim >= 2]
        for layer in reversed(layers_of(decoder_of(student.model)))
    )
    blocks = [block for block in matrices if block]  # adapters may be on some layers alone
    if layers is not None:
        chosen = [p for block in blocks[:layers] for p in block]
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return [chosen]
    known = {id(p) for block in blocks for p in block}
    rest = [p for p in trained if id(p) not in known]
    return [group for group in (*blocks, rest) if group]


def segment_sketches(
    student: StudentModel,
    batch: Batch,
    candidates: tuple[int, ...],
    groups: Groups,
    *,
    objectives: Sequence[Objective] = (SampledPg(),),
    merge_terminators: bool = True,
    scales: Sequence[Sequence[torch.Tensor]] | None = None,
    teacher: TeacherHead | None = None,
) -> list[list[torch.Tensor]]:
    """Sketches of the gradient of tokens in (0, c_1], (c_1, c_2], ..., and beyond the last one.

    Of each segment those of each group. One group is of last layers: the head is passed once, and a
    segment costs a backward pass through these. With several the head may be among them, and is
    passed with each segment.
    """
    edges = torch.tensor(candidates, device=batch.positions_N.device)
    segment_N = torch.bucketize(batch.positions_N, edges, right=True)
    hidden_BLH = rows_hidden(decoder_of(student.model), batch.input_ids_BL, batch.attention_mask_BL)
    flat = [parameter for group in groups for parameter in group]
    head = output_head(student.model)
    loss_of = partial(
        batch_loss, objectives=objectives, merge_terminators=merge_terminators, teacher=teacher
    )
    is_whole = len(groups) > 1
    grad_BLH = torch.zeros_like(hidden_BLH)
    if not is_whole:
        leaf_BLH = hidden_BLH.detach().requires_grad_()
        head = replace(head, weight_VH=head.weight_VH.detach())
        (grad_BLH,) = torch.autograd.grad(loss_of(leaf_BLH, head, batch).loss, leaf_BLH)
    sketches: list[list[torch.Tensor]] = []
    for segment in range(len(candidates) + 1):
        if is_whole:
            own = replace(batch, weights_N=batch.weights_N * (segment_N == segment))
            loss = loss_of(hidden_BLH, head, own).loss
            found_P = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        else:
            rows = batch.hidden_rows_N[segment_N == segment]
            part = torch.zeros_like(grad_BLH)
            part.flatten(0, 1)[rows] = grad_BLH.flatten(0, 1)[rows]
            found_P = torch.autograd.grad(
                hidden_BLH, flat, part, retain_graph=True, allow_unused=True
            )
        sketches.append(_group_sketches(groups, dict(zip(flat, found_P, strict=True)), scales))
    return sketches


def _group_sketches(
    groups: Groups,
    gradients: Mapping[torch.nn.Parameter, torch.Tensor | None],
    scales: Sequence[Sequence[torch.Tensor]] | None,
) -> list[torch.Tensor]:
    """A sketch of each group; a parameter that nothing went through has no gradient."""
    found: list[torch.Tensor] = []
    for number, group in enumerate(groups):
        own = [torch.zeros_like(p) if (g := gradients[p]) is None else g for p in group]
        if scales is not None:
            own = [g / scale for g, scale in zip(own, scales[number], strict=True)]
        found.append(sketch(own))
    return found


def _scales(
    student: StudentModel, groups: Groups, moments: Mapping[str, Any]
) -> list[list[torch.Tensor]] | None:
    """Root second moments of the optimizer; None before the first step has made some."""
    if not any("exp_avg_sq" in each for each in moments.values()):
        return None
    names = {parameter: name for name, parameter in student.named_parameters()}
    return [
        [moments[names[p]]["exp_avg_sq"].to(p.device).sqrt() + EPSILON for p in group]
        for group in groups
    ]
