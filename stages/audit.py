"""The audit of the adaptive window: do prefixes still point where full rollouts point?

Probes are unfinished rollouts of the round, continued to full length by the weights that wrote them
and scored like any other; nothing trains on them. Before the round trains, the gradient of the
sampled objective (or of the one that trains) is taken segment by segment on the last layers, and
the decision is the window of the next round.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from opd_stream.batches import Batch
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, layers_of, rows_hidden
from opd_stream.loss import batch_loss
from opd_stream.objectives import Objective, SampledPg
from opd_stream.outcome import WindowAudit
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.reader import ScoredRows
from opd_stream.windows import AdaptiveWindow, FixedWindow, choose_window, sketch
from stages.student_model import StudentModel
from stages.train_data import step_batches
from stages.train_job import TrainJob
from stages.train_state import Clock

EPSILON = 1e-8  # of the adam metric


def audit(job: TrainJob) -> WindowAudit | None:
    """The decision for the next round, with its cosines and cost; None without probes."""
    settings = job.config.rollouts.window
    if not isinstance(settings, AdaptiveWindow) or job.probe is None:
        return None
    clock, store = Clock(), job.store()
    rollouts, scores = job.probe
    rows = ScoredRows(
        [(store.by_fingerprint("rollouts", rollouts), store.by_fingerprint("scores", scores))]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = job.load_student().to(device).eval()
    parameters = audited_parameters(student, layers=settings.layers)
    scales = _scales(job, student, parameters) if settings.metric == "adam" else None
    plan = replace(job.plan(), window=FixedWindow(tokens=settings.max_window_tokens))
    probe, objectives, merge = [rows[n] for n in range(len(rows))], (SampledPg(),), True
    if settings.objective == "trained":
        probe = [plan.used(row) for row in probe]
        objectives, merge = job.objectives(), job.config.train.guards.merge_terminators
    teacher = job.teacher(device, vocabulary=student.vocabulary)
    segments = [torch.zeros(1, device=device)] * (len(settings.candidates) + 1)
    for batch in step_batches(probe, plan, job.first_step):
        found = segment_sketches(
            student,
            batch.to(device),
            settings.candidates,
            parameters,
            objectives=objectives,
            merge_terminators=merge,
            scales=scales,
            teacher=teacher,
        )
        segments = [one + other for one, other in zip(segments, found, strict=True)]
    earlier = job.earlier_decision
    decision = choose_window(
        segments,
        settings.candidates,
        threshold=settings.threshold,
        current=job.window_tokens if settings.hysteresis else None,
        earlier=() if earlier is None else earlier.cosines,
        smoothing=settings.smoothing,
    )
    return WindowAudit(
        **dict(decision),
        probe_rows=len(rows),
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
    )


def audited_parameters(student: StudentModel, *, layers: int) -> list[torch.nn.Parameter]:
    """Matrices of the last layers (their adapters where there are some); all others are frozen."""
    last = layers_of(decoder_of(student.model))[-layers:]
    chosen = [p for layer in last for p in layer.parameters() if p.requires_grad and p.ndim == 2]
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def segment_sketches(
    student: StudentModel,
    batch: Batch,
    candidates: tuple[int, ...],
    parameters: list[torch.nn.Parameter],
    *,
    objectives: Sequence[Objective] = (SampledPg(),),
    merge_terminators: bool = True,
    scales: list[torch.Tensor] | None = None,
    teacher: TeacherHead | None = None,
) -> list[torch.Tensor]:
    """Sketches of the gradient of tokens in (0, c_1], (c_1, c_2], ..., and beyond the last one.

    The head is passed once; each segment then costs a backward pass through the last layers.
    """
    decoder = decoder_of(student.model)
    hidden_BLH = rows_hidden(decoder, batch.input_ids_BL, batch.attention_mask_BL)
    leaf_BLH = hidden_BLH.detach().requires_grad_()
    head = output_head(student.model)
    head = replace(head, weight_VH=head.weight_VH.detach())
    found = batch_loss(
        leaf_BLH, head, batch, objectives, merge_terminators=merge_terminators, teacher=teacher
    )
    (grad_BLH,) = torch.autograd.grad(found.loss, leaf_BLH)
    edges = torch.tensor(candidates, device=batch.positions_N.device)
    segment_N = torch.bucketize(batch.positions_N, edges, right=True)
    sketches: list[torch.Tensor] = []
    for segment in range(len(candidates) + 1):
        rows = batch.hidden_rows_N[segment_N == segment]
        part = torch.zeros_like(grad_BLH)
        part.flatten(0, 1)[rows] = grad_BLH.flatten(0, 1)[rows]
        gradients = torch.autograd.grad(hidden_BLH, parameters, part, retain_graph=True)
        if scales is not None:
            gradients = [g / scale for g, scale in zip(gradients, scales, strict=True)]
        sketches.append(sketch(gradients))
    return sketches


def _scales(
    job: TrainJob, student: StudentModel, parameters: list[torch.nn.Parameter]
) -> list[torch.Tensor] | None:
    """Root second moments of the optimizer; None before the first round has made some."""
    state = job.previous_moments()
    if state is None:
        return None
    names = {parameter: name for name, parameter in student.named_parameters()}
    return [state[names[p]]["exp_avg_sq"].to(p.device).sqrt() + EPSILON for p in parameters]
