"""Policies on held-out problems: sample what is missing, judge it, and say how sure that is."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.fetching import fetch
from opd_stream.store.artifact import Artifact, EvaluationResult
from opd_stream.store.store import Store
from opd_stream.tasks.distance import FIGURE_NAMES, TEXT_NAMES
from opd_stream.tasks.pass_at_k import Counts, default_ks, estimates
from pipeline.records import (
    Answers,
    BenchmarkRecord,
    DistanceRecord,
    EvaluationRecord,
    Passes,
)
from pipeline.setup import stop_token_ids
from stages.checkpoints import (
    Checkpoint,
    Vocabulary,
    compare_pair,
    open_checkpoint,
    open_model,
    shared_vocabulary,
)
from stages.distance import distance_result
from stages.evaluate import evaluation_result, evaluation_rollouts
from stages.prompts import make_teacher_prompts, prompts_artifact, teacher_prompts_artifact
from stages.recipes import distance_recipe, hidden_recipe, teacher_text_recipe
from stages.step import (
    DISTANCE,
    EVALUATE,
    HIDDEN,
    TEACHER_TEXT,
    Step,
    with_needs,
)


def evaluation_steps(
    config: Config, store: Store, policy: Checkpoint, vocabulary: Vocabulary, version: int
) -> dict[str, Step]:
    """Answers of a policy to the problems of each benchmark, by its name.

    Args:
        config: its evaluation section says what is asked; none where it has none.
        store: of the run.
        policy: answers.
        vocabulary: of its answers.
        version: of the policy; 0 is the initial student.
    """
    evaluation = config.evaluation
    steps: dict[str, Step] = {}
    for name, part in {} if evaluation is None else evaluation.parts().items():
        assert part.prompts is not None  # validated
        prompts = prompts_artifact(store, part.prompts, policy)
        artifact = evaluation_rollouts(
            store, config, part, prompts=prompts, student=policy, vocabulary=vocabulary
        )
        steps[name] = Step(kind=EVALUATE, round_index=version - 1, artifact=artifact, model=policy)
    return steps


def distance_steps(
    config: Config,
    store: Store,
    part: Evaluation,
    answers: Step,
    vocabulary: Vocabulary,
    teacher: Checkpoint | None = None,
) -> dict[str, Step]:
    """The distances of a policy to the teacher, on its own samples and on the teacher's text.

    Each needs the completions and the teacher's side of them.

    Args:
        config: names the teacher.
        store: of the run.
        part: what is asked.
        answers: the policy's own samples, from `evaluation_steps`.
        vocabulary: of its answers.
        teacher: of the config; None: it is opened here.

    Raises:
        UserError: the teacher is no checkpoint, or does not read the policy's tokens.
    """
    settings, policy = config.teacher, answers.model
    assert settings is not None  # checked before
    assert policy is not None
    assert part.prompts is not None
    teacher = teacher or open_teacher(config, store, policy, vocabulary)
    own = prompts_artifact(store, part.prompts, policy)
    theirs = own
    rendering = settings.rendering(part.prompts)
    if rendering is not None:
        theirs = teacher_prompts_artifact(store, rendering, own, teacher)
    recipe = teacher_text_recipe(
        config, part, prompts=theirs.fingerprint, teacher=teacher, vocabulary=vocabulary
    )
    text = replace(
        answers, kind=TEACHER_TEXT, artifact=store.artifact(recipe), model=teacher, needs=()
    )
    if theirs is own:
        read = {"samples": (None, None), "teacher_text": (None, None)}
    else:  # who wrote a text reads it behind the prompts that it was written to
        read = {"samples": (theirs.fingerprint, None), "teacher_text": (None, own.fingerprint)}
    found: dict[str, Step] = {}
    for name, rollouts in (("samples", answers), ("teacher_text", text)):
        teachers, students = read[name]
        hidden = hidden_recipe(
            settings,
            rollouts=rollouts.artifact.fingerprint,
            teacher=teacher,
            prompts=teachers,
        )
        side = replace(text, kind=HIDDEN, artifact=store.artifact(hidden), needs=(rollouts,))
        recipe = distance_recipe(config.student, hidden=hidden, student=policy, prompts=students)
        found[name] = replace(
            answers, kind=DISTANCE, artifact=store.artifact(recipe), needs=(rollouts, side)
        )
    return found


def make_rendering(
    config: Config, store: Store, part: Evaluation, prompts: Artifact, teacher: Checkpoint
) -> None:
    """Make held-out prompts as the teacher reads them, where it has a rendering of its own.

    Raises:
        UserError: the template or the view does not take a prompt.
    """
    assert part.prompts is not None
    rendering = None if config.teacher is None else config.teacher.rendering(part.prompts)
    if rendering is not None:
        make_teacher_prompts(store, part.prompts, rendering, prompts, teacher)


def open_teacher(
    config: Config, store: Store, policy: Checkpoint, vocabulary: Vocabulary
) -> Checkpoint:
    """The teacher that a policy is compared with.

    Raises:
        UserError: it is no checkpoint, or reads other tokens than the policy.
    """
    assert config.teacher is not None
    teacher = open_checkpoint(store, config.teacher.folder)
    difference = compare_pair(policy, teacher).difference
    if difference is None and vocabulary.size > teacher.known_ids:
        difference = f"the policy writes ids up to {vocabulary.size - 1:,}, which the teacher lacks"
    if difference is not None:
        raise UserError(
            f"evaluation of kind distance compares {policy.folder} with teacher {teacher.folder} "
            f"token by token, and their tokenizers differ: {difference}; use a judge, or a teacher "
            "with the policy's tokenizer"
        )
    return teacher


def evaluation_record(
    config: Config,
    store: Store,
    policy: Checkpoint,
    vocabulary: Vocabulary,
    run_ids: Collection[str],
    *,
    is_first: bool = False,
) -> EvaluationRecord | None:
    """What reports keep of a policy's evaluation, from the store; None: it is not all there.

    Args:
        config: its evaluation section says what is asked.
        store: of the run.
        policy: answers.
        vocabulary: of its answers.
        run_ids: of the run; seconds are of what these made.
        is_first: of the evaluated policies; seconds are then also of what all of them need, the
            teacher's text and its side of it.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    counts: list[Counts] = []
    benchmarks: dict[str, BenchmarkRecord] = {}
    distances: dict[str, DistanceRecord] = {}
    made = list[Step]()
    for name, step in evaluation_steps(config, store, policy, vocabulary, 0).items():
        part = evaluation.parts()[name]
        if part.kind == "distance":
            steps = distance_steps(config, store, part, step, vocabulary)
            record = _distance_record(store, part, steps)
            if record is None:
                return None
            distances[name] = record
            made += with_needs(steps.values())
            continue
        known = evaluation_result(store, part, step.shards)
        if known is None:
            return None
        counts.append(Counts(correct=known[1].correct, samples=known[1].samples))
        benchmarks[name] = _benchmark_record(evaluation, *known)
        made.append(step)
    passes = _passes(counts, _ks(evaluation.pass_at, counts)) if counts else Passes()
    commits = [c for step in made if is_first or not _is_shared(step) for c in step.commits()]
    errors = [each.standard_error or 0.0 for each in benchmarks.values()]
    return EvaluationRecord(
        passes=passes.passes,
        intervals=passes.intervals,
        standard_error=sum(e**2 for e in errors) ** 0.5 / len(errors) if errors else None,
        problems=sum(len(each.correct) for each in counts) if counts else None,
        samples=counts[0].samples if len(counts) == 1 else None,
        seconds=sum(commit.seconds for commit in commits if commit.made_by in run_ids),
        benchmarks=benchmarks,
        distances=distances,
    )


def _benchmark_record(
    evaluation: Evaluation, artifact: str, result: EvaluationResult
) -> BenchmarkRecord:
    counts = Counts(correct=result.correct, samples=result.samples)
    passes = _passes([counts], _ks(evaluation.pass_at, [counts]))
    return BenchmarkRecord(
        passes=passes.passes,
        intervals=passes.intervals,
        standard_error=result.standard_error,
        problems=result.problems,
        samples=result.samples,
        mean_tokens=result.completion_tokens / (result.problems * result.samples),
        cut=result.length_rows,
        artifact=artifact,
        left_out=len(result.left_out),
    )


def _is_shared(step: Step) -> bool:
    """Whether a step is of the teacher alone, and serves every policy."""
    return step.kind == TEACHER_TEXT or (step.kind == HIDDEN and step.rollouts.kind == TEACHER_TEXT)


def _distance_record(
    store: Store, part: Evaluation, steps: dict[str, Step]
) -> DistanceRecord | None:
    known = distance_result(store, {text: step.shards for text, step in steps.items()})
    if known is None:
        return None
    artifact, result = known
    return DistanceRecord(
        texts=result.texts,
        prompts=len(result.sums["samples"]),
        samples=part.samples_per_prompt,
        artifact=artifact,
    )


def open_policy(config: Config, store: Store, folder: Path) -> tuple[Checkpoint, Vocabulary]:
    """Any checkpoint, also a hub model or a GGUF file, as a policy; and the ids of its answers.

    They are those of the run's own models too where these read the same tokens, so that a policy of
    the run has the answers it has already.

    Raises:
        UserError: the folder is no checkpoint, or nothing would end its answers.
    """
    policy = open_checkpoint(store, fetch(folder))
    models = [config.student] if config.teacher is None else [config.student, config.teacher]
    known = [open_model(store, model) for model in models if model.is_here]
    same = [
        other
        for other in known
        if other.identity.tokenizer_sha256 == policy.identity.tokenizer_sha256
    ]
    vocabulary = shared_vocabulary((policy, *same), stops=stop_token_ids(config, policy))
    if not vocabulary.stop_ids:
        raise UserError(
            f"policy {folder} names no eos_token_id; expected one in generation_config.json or "
            "config.json; add it"
        )
    return policy, vocabulary


def logged_figures(evaluation: Answers) -> dict[str, float]:
    """The figures of an evaluation by names for loggers, evaluation/PROMPTS/…."""
    found: dict[str, float] = {}
    for name, entry in evaluation.benchmarks.items():
        found |= {f"evaluation/{name}/{figure}": each for figure, each in entry.passes.items()}
    for name, record in evaluation.distances.items():
        for text, distance in record.texts.items():
            for figure in FIGURE_NAMES:
                found[f"evaluation/{name}/{text}/{figure}"] = getattr(distance, figure)
    return found


def figure_lines(evaluation: Answers) -> Iterator[str]:
    """One line a benchmark, and one for their mean where there are several; two a distance."""
    for name, entry in evaluation.distances.items():
        for text, found in entry.texts.items():
            figures = ", ".join(
                f"{said} {getattr(found, figure):.3f} "
                f"[{found.intervals[figure][0]:.3f}, {found.intervals[figure][1]:.3f}]"
                for figure, said in FIGURE_NAMES.items()
            )
            lost = f", {found.left_out:,} not finite" if found.left_out else ""
            yield (
                f"{name}, on {TEXT_NAMES[text]}: {figures}; {found.rows:,} rows{lost}, "
                f"{found.tokens:,} tokens; {entry.artifact}"
            )
    for name, entry in evaluation.benchmarks.items():
        lost = f", {entry.left_out:,} left out for their references" if entry.left_out else ""
        cut = f", {entry.cut:,} cut at the length limit" if entry.cut else ""
        yield (
            f"{name}: {_said(entry)}; {entry.problems:,} problems{lost} × {entry.samples} samples, "
            f"{entry.mean_tokens:.0f} tokens each{cut}; {entry.artifact}"
        )
    if len(evaluation.benchmarks) > 1:
        yield f"mean of {len(evaluation.benchmarks)}: {_said(evaluation)}"


def _said(entry: Passes) -> str:
    return ", ".join(
        f"{name} {entry.passes[name]:.3f} [{low:.3f}, {high:.3f}]"
        for name, (low, high) in entry.intervals.items()
    )


def _ks(asked: Sequence[int] | None, counts: Sequence[Counts]) -> tuple[int, ...]:
    """pass@1 and the k asked for, else those that every set of problems has samples for."""
    if asked is not None:
        return tuple(sorted({1, *asked}))
    return default_ks(min(each.samples for each in counts))


def _passes(counts: Sequence[Counts], ks: Sequence[int]) -> Passes:
    found = estimates(counts, ks)
    return Passes(
        passes={name: estimate for name, (estimate, _) in found.items()},
        intervals={name: (low, high) for name, (_, (low, high)) in found.items()},
    )
