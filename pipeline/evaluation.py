"""Policies on held-out problems: sample what is missing, judge it, and say how sure that is."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.store import Store
from opd_stream.tasks.pass_at_k import Counts, default_ks, estimates
from pipeline.reports import Span, made_by
from stages.checkpoints import Checkpoint, open_checkpoint
from stages.collect import start_rollouts, submit_missing, wait_for
from stages.evaluate import (
    evaluate,
    evaluation_prompts,
    evaluation_result,
    evaluation_rollouts,
)
from stages.executors import Executor
from stages.progress import Progress
from stages.prompts import prompts_artifact


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """What an evaluation works with, and what it did."""

    config: Config
    store: Store
    executor: Executor
    run_id: str
    progress: Progress
    reach: Callable[[set[str]], object]  # told names of artifacts before they are worked on
    spans: list[Span] = field(default_factory=list)

    def measure(
        self,
        student: Checkpoint,
        stop_ids: tuple[int, ...],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """One policy on every benchmark, as far as the store does not have it.

        Raises:
            UserError: prompts or judge are refused, or a worker met a user's mistake.
        """
        evaluation = self.config.evaluation
        assert evaluation is not None
        for part in evaluation.parts().values():
            prompts = evaluation_prompts(self.store, part, student)
            rollouts = evaluation_rollouts(
                self.store,
                self.config,
                part,
                prompts=prompts,
                student=student,
                stop_ids=stop_ids,
            )
            self.reach({prompts.name, rollouts.name})
            start_rollouts(
                self.store, rollouts.recipe, prompts_per_unit=self.config.prompts_per_unit
            )
            work = submit_missing(
                self.executor,
                rollouts,
                None,
                student=student,
                teacher=None,
                made_by=self.run_id,
                progress=self.progress,
            )
            if work.tasks:
                meanwhile()
            self.spans += wait_for(self.executor, work, self.progress, name="evaluate")
            evaluate(self.store, part, rollouts, student)


def known_evaluation(
    config: Config,
    store: Store,
    student: Checkpoint,
    stop_ids: tuple[int, ...],
    run_ids: Collection[str],
) -> dict[str, Any] | None:
    """What the summary keeps of a policy's evaluation, from the store; None: it is not all there.

    Args:
        config: its evaluation section says what is asked.
        store: of the run.
        student: the policy.
        stop_ids: terminators of its answers.
        run_ids: of the run; seconds are of what these made.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    counts: list[Counts] = []
    benchmarks: dict[str, dict[str, Any]] = {}
    seconds, errors = 0.0, list[float]()
    for name, part in evaluation.parts().items():
        assert part.prompts is not None  # validated
        prompts = prompts_artifact(store, part.prompts, student)
        rollouts = evaluation_rollouts(
            store, config, part, prompts=prompts, student=student, stop_ids=stop_ids
        )
        if (known := evaluation_result(store, part, rollouts)) is None:
            return None
        artifact, result = known
        counts.append(Counts(correct=result["correct"], samples=result["samples"]))
        benchmarks[name] = {
            **_figures([counts[-1]], _ks(evaluation.pass_at, [counts[-1]])),
            "standard_error": result["standard_error"],
            "problems": result["problems"],
            "samples": result["samples"],
            "mean_tokens": result["completion_tokens"] / (result["problems"] * result["samples"]),
            "artifact": artifact,
        }
        errors.append(result["standard_error"])
        own = made_by(rollouts.commits().values(), run_ids)
        seconds += sum(commit.seconds for commit in own)
    return {
        **_figures(counts, _ks(evaluation.pass_at, counts)),
        "standard_error": sum(error**2 for error in errors) ** 0.5 / len(errors),
        "problems": sum(len(each.correct) for each in counts),
        "samples": counts[0].samples if len(counts) == 1 else None,
        "seconds": seconds,
        "benchmarks": benchmarks,
    }


def open_policy(config: Config, store: Store, folder: Path) -> tuple[Checkpoint, tuple[int, ...]]:
    """Any Hugging Face folder as a policy to evaluate, and the ids that end its answers.

    They are those of the run's own models too where these read the same tokens, so that a policy of
    the run has the answers it has already.

    Raises:
        UserError: the folder is no checkpoint, or nothing would end its answers.
    """
    policy = open_checkpoint(store, folder)
    models = [config.student] if config.teacher is None else [config.student, config.teacher]
    known = [open_checkpoint(store, model.path) for model in models if model.path.is_dir()]
    same = [
        other
        for other in known
        if other.identity.tokenizer_sha256 == policy.identity.tokenizer_sha256
    ]
    stop_ids = {token for each in (policy, *same) for token in each.terminators()}
    if not stop_ids:
        raise UserError(
            f"policy {folder} names no eos_token_id; expected one in generation_config.json or "
            "config.json; add it"
        )
    return policy, tuple(sorted(stop_ids))


def figure_lines(evaluation: dict[str, Any]) -> Iterator[str]:
    """One line a benchmark, and one for their mean where there are several."""
    benchmarks = evaluation["benchmarks"]
    for name, entry in benchmarks.items():
        yield (
            f"{name}: {_said(entry)}; {entry['problems']:,} problems × {entry['samples']} samples, "
            f"{entry['mean_tokens']:.0f} tokens each; {entry['artifact']}"
        )
    if len(benchmarks) > 1:
        yield f"mean of {len(benchmarks)}: {_said(evaluation)}"


def _said(entry: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {entry[name]:.3f} [{low:.3f}, {high:.3f}]"
        for name, (low, high) in entry["intervals"].items()
    )


def _ks(asked: Sequence[int] | None, counts: Sequence[Counts]) -> tuple[int, ...]:
    """pass@1 and the k asked for, else those that every set of problems has samples for."""
    if asked is not None:
        return tuple(sorted({1, *asked}))
    return default_ks(min(each.samples for each in counts))


def _figures(counts: Sequence[Counts], ks: Sequence[int]) -> dict[str, Any]:
    found = estimates(counts, ks)
    return {
        **{name: estimate for name, (estimate, _) in found.items()},
        "intervals": {name: list(interval) for name, (_, interval) in found.items()},
    }
