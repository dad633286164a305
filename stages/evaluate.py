"""The evaluate stage: verdicts on completions that were sampled like any other rollouts.

The generations are a rollouts artifact of their own, so judging again costs no sampling, and
evaluation shares the student's workers.
"""

import time
from typing import Any

from opd_stream.config import Evaluation
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import canonical_json, publish, publish_new, read_json
from opd_stream.store.recipe import recipe_from_json
from opd_stream.store.schema import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.tasks.judges import judge
from opd_stream.tasks.pass_at_k import pass_at_k, standard_error
from stages.checkpoints import Checkpoint
from stages.recipes import evaluation_recipe
from stages.selection import prompts_of


def evaluate(
    store: Store, evaluation: Evaluation, rollouts: Artifact, student: Checkpoint
) -> dict[str, Any]:
    """Judge complete rollouts; returns the evaluation's result, made once.

    Raises:
        UserError: a prompt has no reference answer.
    """
    recipe = evaluation_recipe(evaluation, rollouts=rollouts.fingerprint)
    artifact = store.artifact(recipe)
    path = artifact.folder / "manifest.json"
    if path.exists():
        manifest = read_json(path)
        recipe_from_json(manifest, f"{artifact.name}/manifest.json")
        return manifest["result"]
    start = time.time()
    result = _result(store, evaluation, rollouts, student)
    record = {**recipe.as_json(), "fingerprint": recipe.fingerprint}
    publish_new(artifact.folder / "recipe.json", canonical_json(record))
    result["judge_seconds"] = round(time.time() - start, 3)
    publish(path, canonical_json({**record, "result": result}))
    return result


def _result(
    store: Store, evaluation: Evaluation, rollouts: Artifact, student: Checkpoint
) -> dict[str, Any]:
    prompts = prompts_of(store, rollouts.recipe)
    ids: list[str] = prompts["prompt_id"].to_pylist()
    answers = dict(zip(ids, prompts["answer"].to_pylist(), strict=True))
    missing = [prompt_id for prompt_id, answer in answers.items() if answer is None]
    if missing:
        raise UserError(
            f"prompt {missing[0]!r} has no reference answer; evaluation needs one for each; "
            "set evaluation.prompts.answer_field"
        )
    is_right = judge(evaluation.judge.kind)
    tokenizer = student.tokenizer()
    correct = dict.fromkeys(answers, 0)
    tokens = length_rows = 0
    for unit in rollouts.units():
        batch = rollouts_batch(rollouts.read_unit(unit))
        texts = tokenizer.batch_decode(
            [row.tolist() for row in batch.completion_ids], skip_special_tokens=True
        )
        for prompt_id, text in zip(batch.prompt_id, texts, strict=True):
            correct[prompt_id] += is_right(text, answers[prompt_id])
        tokens += batch.completion_tokens
        length_rows += sum(reason == "length" for reason in batch.finish_reason)
    samples, counts = evaluation.samples_per_prompt, list(correct.values())
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    return {
        **{f"pass@{k}": pass_at_k(counts, samples=samples, k=k) for k in ks},
        "standard_error": standard_error(counts, samples=samples),
        "problems": len(counts),
        "samples": samples,
        "completion_tokens": tokens,
        "length_rows": length_rows,
        "correct": correct,
    }
