"""The generate and score stages: make the units that are missing, and only those.

One call serves both stages because they stream: a unit is scored as soon as it is published. With
every rollout committed it is the score stage; without scores it is the generate stage.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit, summed_counts
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from stages.checkpoints import Checkpoint
from stages.executors import Executor
from stages.prompts import probe_size, prompt_count
from stages.recipes import head_beside
from stages.step import Progress
from stages.workers import Role, Task

Span = tuple[float, float]  # start and end of work, seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedWork:
    """Tasks that an executor has, for `wait_for`."""

    rollouts: Artifact
    scores: Artifact | None
    tasks: tuple[Task, ...]
    to_generate: frozenset[int]  # units
    to_score: frozenset[int]

    @property
    def teacher(self) -> str | None:
        """Name of who scores, of several, where anything is left to do."""
        return self.tasks[0].teacher_name if self.tasks else None


def start_rollouts(store: Store, recipe: Recipe, *, prompts_per_unit: int) -> Artifact:
    """Join or start a rollouts artifact."""
    artifact = store.artifact(recipe)
    if artifact.is_started():
        return artifact
    if "extends" in recipe.settings:
        base = store.by_fingerprint("rollouts", recipe.inputs["rollouts"])
        sizes = [len(base.unit_rows(unit)) for unit in recipe.settings["extends"]]
        artifact.create(rows=sum(sizes), rows_per_unit=max(sizes))
    else:
        rows = prompt_count(store, recipe)
        artifact.create(rows=rows, rows_per_unit=prompts_per_unit)
    return artifact


def start_probe(store: Store, recipe: Recipe, rollouts: Artifact) -> Artifact | None:
    """Join or start the probe of complete rollouts, one unit; None where none is unfinished."""
    counts = summed_counts(rollouts.commits().values())
    cut = int(counts.get("length_rows", 0))
    if not cut:
        return None
    artifact = store.artifact(recipe)
    if not artifact.is_started():
        rows = probe_size(int(counts["rows"]), recipe.settings["probe"], cut)
        artifact.create(rows=rows, rows_per_unit=rows)
    return artifact


def start_scores(store: Store, recipe: Recipe, rollouts: Artifact) -> Artifact:
    """Join or start a scores artifact with the units of its rollouts."""
    artifact = store.artifact(recipe)
    layout = rollouts.layout()
    artifact.create(rows=layout.rows, rows_per_unit=layout.rows_per_unit)
    if artifact.layout() != layout:
        raise UserError(
            f"{artifact.name} has units of {artifact.layout().rows_per_unit} prompts, its "
            f"rollouts of {layout.rows_per_unit}; expected the same; delete {artifact.folder}"
        )
    return artifact


def missing_units(artifact: Artifact, progress: Progress, *, verify: bool = True) -> list[int]:
    """The units to make; a damaged one is named, taken out and made again, alone.

    Without `verify` nothing is read: what is committed is taken as whole.
    """
    missing: list[int] = []
    committed, is_listed = set(artifact.committed()), artifact.is_complete()
    if not verify:
        return [unit for unit in artifact.units() if unit not in committed]
    for unit in artifact.units():
        if unit not in committed and not is_listed:  # nothing was made that could be damaged
            missing.append(unit)
            continue
        reason = artifact.damage(unit)
        if reason is not None and artifact.record_damage(unit) and artifact.restore_record(unit):
            progress.warn(f"unit {unit} of {artifact.name}: {reason}; the manifest has it")
            reason = artifact.damage(unit)
        if reason is None:
            continue
        if artifact.has_unit(unit):
            progress.warn(f"unit {unit} of {artifact.name} is damaged ({reason}); it is made again")
            artifact.invalidate(unit)
        missing.append(unit)
    return missing


def make_again(damaged: DamagedUnit, earlier: set[tuple[str, int]], progress: Progress) -> None:
    """Invalidate a unit that was found damaged; `earlier` are the units this was done to before.

    Raises:
        UserError: it is the same unit's second time: making it again does not help.
    """
    unit = (damaged.artifact.name, damaged.unit)
    if unit in earlier:
        raise UserError(
            f"{damaged}, right after it was made again; the store does not return what is written "
            "to it: check its disk, memory and network, then run again"
        ) from damaged
    earlier.add(unit)
    progress.warn(f"{damaged}; it is made again")
    damaged.artifact.invalidate(damaged.unit)


def submit_missing(
    executor: Executor,
    rollouts: Artifact,
    scores: Artifact | None,
    *,
    student: Checkpoint,
    teacher: Checkpoint | None,
    teacher_name: str | None = None,
    siblings: Sequence[Artifact] = (),
    made_by: str,
    progress: Progress,
    generate: bool = True,
    shuffle: bool = False,
    verify: bool = True,
    author: Role = "student",
    check: Callable[[Checkpoint], None] | None = None,
) -> SubmittedWork:
    """Submit a task for every missing unit of started rollouts and scores or hidden states.

    Args:
        executor: runs the tasks; Ray's workers start at once.
        rollouts, scores: made by the student and by the teacher; None: only sample.
        student, teacher: checkpoints of the recipes of rollouts and scores.
        teacher_name, siblings: of several, and the scores by the others.
        made_by, progress: id of the run; warned of damaged units.
        generate: False: score only what is published.
        shuffle: in random order, so that several machines on one artifact share the work.
        verify: read what is committed; False: that was done before.
        author: the pool whose model samples the rollouts.
        check: called with the model that is about to sample.
    """
    to_generate = missing_units(rollouts, progress, verify=verify) if generate else []
    to_score = _units_to_score(rollouts, scores, to_generate, progress, verify=verify)
    if not generate:
        there = set(rollouts.committed())
        to_score = [unit for unit in to_score if unit in there]
    one = Task(
        unit=0,
        rollouts=rollouts.fingerprint,
        scores=None if scores is None else scores.fingerprint,
        student=str(student.folder),
        teacher=None if teacher is None else str(teacher.folder),
        made_by=made_by,
        policy=student.policy,
        teacher_policy=None if teacher is None else teacher.policy,
        teacher_name=teacher_name,
        siblings=tuple(other.fingerprint for other in siblings),
        author=author,
        teacher_side=_kind_of(scores),
    )
    tasks = [replace(one, unit=unit) for unit in sorted({*to_generate, *to_score})]
    if shuffle:
        random.shuffle(tasks)
    if to_generate and check is not None:
        check(teacher if author == "teacher" and teacher is not None else student)
    if tasks:
        executor.submit(tasks)
    units = {"to_generate": frozenset(to_generate), "to_score": frozenset(to_score)}
    return SubmittedWork(rollouts=rollouts, scores=scores, tasks=tuple(tasks), **units)


def open_teacher(
    executor: Executor, rollouts: Artifact, scores: Artifact, teacher: Checkpoint, name: str | None
) -> None:
    """Open one of several teachers, of that name, for the first unit that it has to score.

    Raises:
        UserError: it cannot be opened.
    """
    unit = next((unit for unit in scores.units() if scores.commit_record(unit) is None), None)
    if unit is None:
        return
    task = Task(
        unit=unit,
        rollouts=rollouts.fingerprint,
        scores=scores.fingerprint,
        student="",
        teacher=str(teacher.folder),
        made_by="",
        teacher_policy=teacher.policy,
        teacher_name=name,
        only_opens=True,
    )
    executor.submit([task])
    list(executor.results([task]))


def _kind_of(scores: Artifact | None) -> Literal["scores", "hidden"]:
    return "hidden" if scores is not None and scores.recipe.kind == "hidden" else "scores"


def _units_to_score(
    rollouts: Artifact, scores: Artifact | None, new: list[int], progress: Progress, *, verify: bool
) -> list[int]:
    """Units that lack their scores, or were scored from other bytes; `new` ones are sampled now."""
    if scores is None:
        return []
    missing = missing_units(scores, progress, verify=verify)
    stale = _made_of_other_bytes(rollouts, scores) if verify else []
    lost = _for_head(scores, progress, verify)
    return sorted({*missing, *stale, *new, *lost})


def _for_head(hidden: Artifact, progress: Progress, verify: bool) -> list[int]:
    """A unit whose task makes the head that stands beside hidden states again, where it is lost."""
    if "head" not in hidden.recipe.inputs:
        return []
    head = Artifact(hidden.folder.parent.parent, head_beside(hidden.recipe))
    is_whole = head.is_started() and not missing_units(head, progress, verify=verify)
    return [] if is_whole else [0]


def measure_missing(
    executor: Executor,
    distances: Artifact,
    *,
    hidden: Artifact,
    student: Checkpoint,
    made_by: str,
    progress: Progress,
    check: Callable[[Checkpoint], None],
) -> list[Span]:
    """Measure every missing unit of started distances, whose teacher's side is complete.

    Returns when the workers were busy. `hidden` is the teacher's side, and `check` is called with
    a student that is about to work.

    Raises:
        UserError: a worker met a user's mistake.
    """
    inputs = distances.recipe.inputs
    missing = missing_units(distances, progress)
    stale = _made_of_other_bytes(hidden, distances)
    for unit in stale:
        distances.invalidate(unit)
    tasks = [
        Task(
            unit=unit,
            rollouts=inputs["rollouts"],
            scores=inputs["hidden"],
            student=str(student.folder),
            teacher=None,
            made_by=made_by,
            policy=student.policy,
            teacher_side="hidden",
            distances=distances.fingerprint,
        )
        for unit in sorted({*missing, *stale})
    ]
    if tasks:
        check(student)
        executor.submit(tasks)
    progress.start("evaluate", len(tasks))
    spans: list[Span] = []
    for result in executor.results(tasks):
        spans += [] if result.generate_span is None else [result.generate_span]
        progress.advance("evaluate", 1, result.generated_tokens)
    distances.finish()
    return spans


def wait_for(
    executor: Executor,
    work: SubmittedWork,
    progress: Progress,
    *,
    name: str = "generate",
    meanwhile: Callable[[], object] | None = None,
) -> list[Span]:
    """Wait until submitted work is done; returns when the workers were busy.

    Sampling is shown as the stage `name`, scoring with the teacher's name where there are several.
    `meanwhile` is called after the first unit, when workers need no processor to start any more.

    Raises:
        UserError: a worker met a user's mistake.
    """
    window = {"window": work.rollouts.recipe.settings["window_tokens"]}
    progress.start(name, len(work.to_generate))
    progress.advance(name, 0, **window)
    score = "score" if work.teacher is None else f"score {work.teacher}"
    if work.scores is not None:
        progress.start(score, len(work.to_score))
        progress.advance(score, 0, **window)
    spans: list[Span] = []
    for result in executor.results(work.tasks):
        spans += [span for span in (result.generate_span, result.score_span) if span is not None]
        unit = result.task.unit
        progress.advance(name, unit in work.to_generate, result.generated_tokens)
        progress.advance(score, unit in work.to_score, result.scored_tokens)
        if meanwhile is not None:
            meanwhile()
            meanwhile = None
    work.rollouts.finish()
    if work.scores is not None:
        work.scores.finish()
    return spans


def _made_of_other_bytes(rollouts: Artifact, scores: Artifact) -> list[int]:
    """Units whose rollouts or hidden states were made again since, with other bytes."""
    scored = scores.commits()
    sources = rollouts.commits() if scored else {}
    return [
        unit
        for unit, record in scored.items()
        if unit in sources and sources[unit].sha256 != record.source_sha256
    ]
