"""Prompts stage: a source becomes one verified shard of token ids."""

from opd_stream.config.prompts import Prompts
from opd_stream.prompts import prompts_table, source_settings
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from stages.checkpoints import Checkpoint


def prompts_artifact(store: Store, source: Prompts, student: Checkpoint) -> Artifact:
    """The prompts artifact of a source, whether it exists or not.

    Raises:
        UserError: a file of the source does not exist.
    """
    recipe = Recipe(
        kind="prompts",
        settings={**source_settings(source), "rendering": student.identity.rendering_sha256},
        inputs={"tokenizer": student.identity.tokenizer_sha256},
    )
    return store.artifact(recipe)


def make_prompts(store: Store, source: Prompts, student: Checkpoint) -> Artifact:
    """The prompts artifact of a source under the student's tokenizer, made if it is missing.

    Raises:
        UserError: the source cannot be read or a prompt does not fit.
    """
    artifact = prompts_artifact(store, source, student)
    if artifact.is_complete() and artifact.damage(0) is None:
        return artifact
    table = prompts_table(source, student.tokenizer())
    artifact.create(rows=table.num_rows, rows_per_unit=table.num_rows)
    if artifact.commit_record(0) is not None and artifact.damage(0) is not None:
        artifact.condemn(0)
    artifact.commit(0, table, counts={"rows": table.num_rows})
    artifact.finish()
    return artifact
