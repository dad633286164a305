"""Policies on held-out problems: sample what is missing, judge it, and say how sure that is."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.fetching import fetch
from opd_stream.store.store import Store
from opd_stream.tasks.pass_at_k import Counts, default_ks, estimates
from pipeline.records import Answers, BenchmarkRecord, EvaluationRecord, Passes
from pipeline.setup import stop_token_ids
from stages.checkpoints import Checkpoint, Vocabulary, open_checkpoint, shared_vocabulary
from stages.evaluate import evaluation_result, evaluation_rollouts
from stages.prompts import prompts_artifact
from stages.step import EVALUATE, Step


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


def evaluation_record(
    config: Config,
    store: Store,
    policy: Checkpoint,
    vocabulary: Vocabulary,
    run_ids: Collection[str],
) -> EvaluationRecord | None:
    """What reports keep of a policy's evaluation, from the store; None: it is not all there.

    Args:
        config: its evaluation section says what is asked.
        store: of the run.
        policy: answers.
        vocabulary: of its answers.
        run_ids: of the run; seconds are of what these made.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    counts: list[Counts] = []
    benchmarks: dict[str, BenchmarkRecord] = {}
    seconds, errors = 0.0, list[float]()
    for name, step in evaluation_steps(config, store, policy, vocabulary, 0).items():
        known = evaluation_result(store, evaluation.parts()[name], step.shards)
        if known is None:
            return None
        artifact, result = known
        counts.append(Counts(correct=result.correct, samples=result.samples))
        passes = _passes([counts[-1]], _ks(evaluation.pass_at, [counts[-1]]))
        benchmarks[name] = BenchmarkRecord(
            passes=passes.passes,
            intervals=passes.intervals,
            standard_error=result.standard_error,
            problems=result.problems,
            samples=result.samples,
            mean_tokens=result.completion_tokens / (result.problems * result.samples),
            artifact=artifact,
            left_out=len(result.left_out),
        )
        errors.append(result.standard_error)
        seconds += sum(c.seconds for c in step.commits() if c.made_by in run_ids)
    passes = _passes(counts, _ks(evaluation.pass_at, counts))
    return EvaluationRecord(
        passes=passes.passes,
        intervals=passes.intervals,
        standard_error=sum(error**2 for error in errors) ** 0.5 / len(errors),
        problems=sum(len(each.correct) for each in counts),
        samples=counts[0].samples if len(counts) == 1 else None,
        seconds=seconds,
        benchmarks=benchmarks,
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
    known = [open_checkpoint(store, model.folder) for model in models if model.is_here]
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


def figure_lines(evaluation: Answers) -> Iterator[str]:
    """One line a benchmark, and one for their mean where there are several."""
    for name, entry in evaluation.benchmarks.items():
        lost = f", {entry.left_out:,} left out for their references" if entry.left_out else ""
        yield (
            f"{name}: {_said(entry)}; {entry.problems:,} problems{lost} × {entry.samples} samples, "
            f"{entry.mean_tokens:.0f} tokens each; {entry.artifact}"
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
