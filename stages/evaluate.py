"""The evaluate stage: verdicts on completions that were sampled like any other rollouts.

The generations are a rollouts artifact of their own, so judging again, or judging fewer samples,
costs no sampling, and evaluation shares the student's workers.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, EvaluationManifest, EvaluationResult
from opd_stream.store.recipe import Recipe
from opd_stream.store.sealed import load_record
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.tasks.judges import Judge, open_judge
from opd_stream.tasks.pass_at_k import default_ks, pass_at_k, standard_error
from stages.checkpoints import Checkpoint, Vocabulary
from stages.filtering import completion_texts
from stages.prompts import make_prompts, prompts_of
from stages.recipes import evaluation_recipe, evaluation_rollouts_recipe

SHOWN = 3  # prompts that a line names


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedAnswer:
    """One answer to a held-out problem, as the judge saw it, and its verdict."""

    prompt_id: str
    sample_index: int
    prompt: str
    completion: str
    reference: str
    is_right: bool
    num_tokens: int
    finish_reason: str  # stop or length


def evaluation_field(name: str) -> str:
    """How messages name a set of problems."""
    return f"evaluation ({name})"


def evaluation_prompts(
    store: Store, name: str, evaluation: Evaluation, student: Checkpoint
) -> Artifact:
    """The prompts of one set of problems, by its name, under a policy's tokenizer.

    Raises:
        UserError: the source cannot be read.
    """
    assert evaluation.prompts is not None
    return make_prompts(store, evaluation.prompts, student, field=evaluation_field(name))


def judged_rows(table: pa.Table, judge: Judge) -> tuple[pa.Table, list[str]]:
    """Prompts whose reference answers a judge can read, and the ids of the others, in order."""
    lost = set(judge.unreadable(table["answer"].to_pylist()))
    ids: list[str] = table["prompt_id"].to_pylist()
    kept = pa.array([row not in lost for row in range(table.num_rows)], pa.bool_())
    return table.filter(kept), [ids[row] for row in sorted(lost)]


def unjudged_line(field: str, table: pa.Table, judge: Judge, kind: str) -> str | None:
    """What is left out of the verdicts, in a line; None: nothing.

    Args:
        field: of the config that names the prompts.
        table: the prompts.
        judge: that is to read their reference answers.
        kind: of the judge, for the line.

    Raises:
        UserError: there is not one reference that the judge can read.
    """
    kept, lost = judged_rows(table, judge)
    answers = dict(zip(table["prompt_id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    shown = ", ".join(
        f"{name}: {'none' if answers[name] is None else repr(answers[name][:40])}"
        for name in lost[:SHOWN]
    )
    if not kept.num_rows:
        raise UserError(
            f"{field}: none of {table.num_rows:,} prompts has a reference answer that judge {kind} "
            f"can read ({shown}); expected one for each; set answer_field of these prompts, mend "
            "the answers, or use another judge"
        )
    if not lost:
        return None
    return (
        f"{field}: {len(lost):,} of {table.num_rows:,} prompts are left out of the verdicts: they "
        f"have no reference answer that judge {kind} can read ({shown})"
    )


def evaluation_rollouts(
    store: Store,
    config: Config,
    evaluation: Evaluation,
    *,
    prompts: Artifact,
    student: Checkpoint,
    vocabulary: Vocabulary,
) -> Artifact:
    """The held-out rollouts of a policy; those with more samples where only these exist.

    Every rollout has random numbers of its own, so the first samples of many are those of few.
    """
    recipe = evaluation_rollouts_recipe(
        config, evaluation, prompts=prompts.fingerprint, student=student, vocabulary=vocabulary
    )
    artifact = store.artifact(recipe)
    return artifact if artifact.is_complete() else _with_more_samples(store, recipe) or artifact


def evaluate(store: Store, evaluation: Evaluation, rollouts: Artifact, student: Checkpoint) -> None:
    """Judge complete rollouts, unless the store has the result.

    Raises:
        UserError: the judge cannot be opened, or cannot judge.
    """
    recipe = evaluation_recipe(evaluation, rollouts.recipe)
    store.artifact(recipe).mend_figures(EvaluationManifest)
    if evaluation_result(store, evaluation, rollouts) is not None:
        return
    result = _judged(store, evaluation, rollouts, student)
    store.artifact(recipe).publish_figures(EvaluationManifest.of(recipe, result=result))


def _with_more_samples(store: Store, recipe: Recipe) -> Artifact | None:
    """A complete artifact that differs in nothing but having more samples; the smallest."""
    wanted = recipe.settings["samples_per_prompt"]
    found = [
        other
        for other in store.recipes("rollouts")
        if other.inputs == recipe.inputs
        and other.settings.get("samples_per_prompt", 0) > wanted
        and {**other.settings, "samples_per_prompt": wanted} == recipe.settings
    ]
    found.sort(key=lambda other: other.settings["samples_per_prompt"])
    artifacts = map(store.artifact, found)
    return next((artifact for artifact in artifacts if artifact.is_complete()), None)


def evaluation_result(
    store: Store, evaluation: Evaluation, rollouts: Artifact
) -> tuple[str, EvaluationResult] | None:
    """The evaluation's name and result, if they are in the store."""
    artifact = store.artifact(evaluation_recipe(evaluation, rollouts.recipe))
    path = artifact.folder / "manifest.json"
    if not path.exists():
        return None
    return artifact.name, load_record(EvaluationManifest, path).result


def _judged(
    store: Store, evaluation: Evaluation, rollouts: Artifact, student: Checkpoint
) -> EvaluationResult:
    """Verdicts on the first `samples_per_prompt` answers to each problem."""
    assert evaluation.judge is not None
    start, samples = time.time(), evaluation.samples_per_prompt
    judge = open_judge(evaluation.judge)
    prompts, left_out = judged_rows(prompts_of(store, rollouts.recipe), judge)
    correct = dict.fromkeys(prompts["prompt_id"].to_pylist(), 0)
    tokens = length_rows = 0
    for answer in _judged_answers(judge, prompts, rollouts, student, samples):
        correct[answer.prompt_id] += answer.is_right
        tokens += answer.num_tokens
        length_rows += answer.finish_reason == "length"
    counts = list(correct.values())
    return EvaluationResult(
        passes={f"pass@{k}": pass_at_k(counts, samples=samples, k=k) for k in default_ks(samples)},
        standard_error=standard_error(counts, samples=samples),
        problems=len(counts),
        samples=samples,
        completion_tokens=tokens,
        length_rows=length_rows,
        correct=correct,
        judge_seconds=round(time.time() - start, 3),
        left_out=tuple(left_out),
    )


def judged_answers(
    store: Store, evaluation: Evaluation, rollouts: Artifact, student: Checkpoint
) -> Iterator[JudgedAnswer]:
    """The answers that an evaluation's figures are of; the judge is asked anew.

    Raises:
        UserError: the judge cannot be opened, or cannot judge.
    """
    assert evaluation.judge is not None
    judge = open_judge(evaluation.judge)
    prompts, _ = judged_rows(prompts_of(store, rollouts.recipe), judge)
    return _judged_answers(judge, prompts, rollouts, student, evaluation.samples_per_prompt)


def _judged_answers(
    judge: Judge, prompts: pa.Table, rollouts: Artifact, student: Checkpoint, samples: int
) -> Iterator[JudgedAnswer]:
    """The first `samples` answers to each of some prompts, shard by shard."""
    tokenizer = student.tokenizer()
    asked = {
        row["prompt_id"]: row for row in prompts.select(["prompt_id", "text", "answer"]).to_pylist()
    }
    for unit in rollouts.units():
        batch = rollouts_batch(rollouts.read_unit(unit))
        texts = completion_texts(tokenizer, [*map(batch.answer_ids, range(len(batch)))])
        rows = [
            row
            for row, name in enumerate(batch.prompt_id)
            if batch.sample_index[row] < samples and name in asked
        ]
        pairs = [(texts[row], asked[batch.prompt_id[row]]["answer"]) for row in rows]
        for row, is_right in zip(rows, judge.verdicts(pairs), strict=True):
            name = batch.prompt_id[row]
            yield JudgedAnswer(
                prompt_id=name,
                sample_index=int(batch.sample_index[row]),
                prompt=asked[name]["text"],
                completion=texts[row],
                reference=asked[name]["answer"],
                is_right=bool(is_right),
                num_tokens=int(batch.own_tokens(row).sum()),
                finish_reason=batch.finish_reason[row],
            )
