"""Rollouts that are not scored: what a recipe of scores leaves out, and their places among scores.

A judge is opened here as the recipe names it, and only if it judges here as it would where the
recipe was written: a run has asked for it, with code execution allowed, before any work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from opd_stream.errors import UserError
from opd_stream.filters import OTHER_TEACHER, REASONS, Keep, Reason, dropped_rows
from opd_stream.store.artifact import Artifact, Commit
from opd_stream.store.codecs import ALIGNED
from opd_stream.store.recipe import Recipe
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tasks.judges import (
    AnyJudge,
    BuiltInJudge,
    CodeJudge,
    FunctionJudge,
    Judge,
    judge_recipe,
    open_judge,
)
from opd_stream.types import RolloutBatch, ScoreBatch

_JUDGE: TypeAdapter[AnyJudge] = TypeAdapter(AnyJudge)
_KINDS = {"code": CodeJudge, "function": FunctionJudge}


def keep_recipe(keep: Keep) -> dict[str, Any]:
    """What of the conditions decides which rollouts are left out.

    Raises:
        UserError: as `open_judge`.
    """
    settings = keep.model_dump(mode="json", exclude={"judge"}, exclude_defaults=True)
    if keep.judge is None:
        return settings
    return {**settings, "verdict": keep.verdict, "judge": judge_recipe(keep.judge)}


class RolloutFilter:
    """The conditions of recipes of scores, with their judge; for all rounds.

    Raises:
        UserError: its judge would not judge here as where the recipe was written.
    """

    def __init__(self, scores: Recipe, folder: Path) -> None:
        """Open it; `folder` has the student's tokenizer."""
        settings: dict[str, Any] = dict(scores.settings["keep"])
        recipe: dict[str, Any] | None = settings.pop("judge", None)
        judge = None if recipe is None else _judge_of(recipe, scores)
        self._keep = Keep.model_validate(
            {**settings, **({} if judge is None else {"judge": judge})}
        )
        self._judge: Judge | None = None if judge is None else open_judge(judge)
        if self._judge is not None:
            self._tokenizer = open_tokenizer(folder)

    def dropped(self, batch: RolloutBatch, prompts: Callable[[], pa.Table]) -> dict[int, Reason]:
        """Row -> why it is left out, of a unit of rollouts; `prompts` gives those that it is of."""
        if self._judge is None:
            return dropped_rows(self._keep, batch)
        judge = self._judge

        def verdicts(rows: Sequence[int]) -> list[bool | None]:
            references = readable_answers(judge, prompts())
            known = [row for row in rows if batch.prompt_id[row] in references]
            texts = completion_texts(self._tokenizer, [batch.answer_ids(row) for row in known])
            answers = [references[batch.prompt_id[row]] for row in known]
            found = dict(
                zip(known, judge.verdicts(list(zip(texts, answers, strict=True))), strict=True)
            )
            return [found.get(row) for row in rows]

        return dropped_rows(self._keep, batch, verdicts)


def readable_answers(judge: Judge, prompts: pa.Table) -> dict[str, str]:
    """Prompt id -> its reference answer, where the judge can read it."""
    ids, answers = (prompts[name].to_pylist() for name in ("prompt_id", "answer"))
    unreadable = set(judge.unreadable(answers))
    pairs = enumerate(zip(ids, answers, strict=True))
    return {name: text for n, (name, text) in pairs if n not in unreadable}


def _judge_of(recipe: dict[str, Any], scores: Recipe) -> BuiltInJudge | CodeJudge | FunctionJudge:
    """The judge that a recipe names."""
    kind = _KINDS.get(recipe["kind"], BuiltInJudge)
    settings = {name: value for name, value in recipe.items() if name in kind.model_fields}
    if kind is CodeJudge:
        settings["allow_code_execution"] = True  # by the run that asks for these scores
    judge = _JUDGE.validate_python(settings)
    if (here := judge_recipe(judge)) != recipe:
        differing = sorted(name for name in {*here, *recipe} if here.get(name) != recipe.get(name))
        raise UserError(
            f"rollouts.keep.judge of scores/{scores.fingerprint[:16]} differs on this machine in "
            f"{', '.join(differing)}; expected the same judge wherever rollouts are scored; use "
            "the same versions on all machines"
        )
    return judge


def completion_texts(tokenizer: Any, completions: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
    """Completions as text, without special tokens."""
    return tokenizer.batch_decode(
        [ids.tolist() for ids in completions],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def chosen_rows(batch: RolloutBatch, rows: Sequence[int]) -> RolloutBatch:
    """Some rows of a batch, in the given order."""

    def chosen(column: Any) -> Any:
        if column is None or isinstance(column, np.ndarray):
            return None if column is None else column[list(rows)]
        return tuple(column[row] for row in rows)

    return replace(
        batch, **{each.name: chosen(getattr(batch, each.name)) for each in fields(batch)}
    )


def dropped_counts(dropped: Mapping[int, Reason]) -> dict[str, int]:
    """What a commit record says of rows that are left out: each reason that occurs."""
    found: dict[str, int] = {}
    for reason in dropped.values():
        found[f"dropped_{reason}"] = found.get(f"dropped_{reason}", 0) + 1
    return found


def rows_by_reason(dropped: Mapping[int, Reason]) -> dict[str, list[int]]:
    """Rows that are left out, by the reason."""
    found: dict[str, list[int]] = {}
    for row in sorted(dropped):
        found.setdefault(dropped[row], []).append(row)
    return found


def decided_rows(
    siblings: Sequence[Artifact], scores: Recipe, unit: int, source: Commit | None
) -> dict[int, Reason | None]:
    """Row -> why the same conditions left it out for another teacher; None: they kept it.

    What a teacher reads of a prompt is all of its rollouts, and a reason is of a prompt's alone.

    Args:
        siblings: scores of the same rollouts by others.
        scores: the recipe with the conditions.
        unit: of the rollouts.
        source: its commit record.
    """
    known: dict[int, Reason | None] = {}
    for other in siblings:
        record = other.commit_record(unit)
        if record is None or source is None or record.source_sha256 != source.sha256:
            continue
        if other.recipe.settings.get("keep") != scores.settings["keep"]:
            continue
        reason_of = {row: why for why, rows in record.dropped_rows.items() for row in rows}
        for row in range(int(record.counts["rows"])):
            if reason_of.get(row) != OTHER_TEACHER:
                known[row] = cast(Reason | None, reason_of.get(row))
    return known


def in_places(
    scored: ScoreBatch, rows: Sequence[int], dropped: Mapping[int, Reason], *, states: int | None
) -> ScoreBatch:
    """The scores of some rows in their places among all; the others have none, and a reason.

    `states` is the width of hidden states, where scores have them.
    """
    places = {row: place for place, row in enumerate(rows)}
    flat = ("teacher_logprobs", "teacher_tail_logprobs", *ALIGNED)

    def column(name: str) -> Any:
        found = getattr(scored, name)
        if name == "teacher_states" and states is not None:
            found = found or ()
        if found is None:
            return None
        width = states if name == "teacher_states" else 0
        nothing = np.zeros(0 if name in flat else (0, width or 0), np.float32)
        empty = found[0][:0] if found else nothing
        return tuple(
            found[places[row]] if row in places else empty
            for row in range(len(rows) + len(dropped))
        )

    names = [each.name for each in fields(scored) if each.name != "refused"]
    refused = {rows[place]: reason for place, reason in scored.refused.items()}
    refused |= {row: said(reason) for row, reason in dropped.items()}
    return ScoreBatch(**{name: column(name) for name in names}, refused=refused)


def said(reason: Reason) -> str:
    """Why a row has no scores, as it says itself."""
    if reason == OTHER_TEACHER:
        return "its prompt goes to another teacher"
    return f"rollouts.keep: {REASONS[reason]}"
