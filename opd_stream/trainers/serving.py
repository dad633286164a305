"""What a cache can serve: objectives that read what it holds, and texts of one tokenizer."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_stream.config.sections import unserved_by_chunks
from opd_stream.errors import UserError
from opd_stream.objectives import AnyObjective
from opd_stream.store.artifact import Artifact
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import tokenizer_digest

Cache = tuple[Artifact, Artifact]  # rollouts, and their scores


def check_served(
    caches: Sequence[Cache],
    objectives: Sequence[AnyObjective],
    *,
    top_k: int | None,
    merge_terminators: bool = True,
) -> None:
    """Refuse objectives that what is cached cannot serve.

    Args:
        caches: (rollouts, scores) of each.
        objectives: what is to be minimised.
        top_k: teacher candidates to use.
        merge_terminators: all terminators are one outcome.

    Raises:
        UserError: says which cache lacks what.
    """
    if not objectives:
        raise UserError("there is no objective; expected at least one, such as Bucket()")
    needed = {part.reads: part.kind for part in objectives}
    if len({rollouts.recipe.settings.get("origin") for rollouts, _ in caches}) > 1:
        raise UserError(
            "some caches hold rollouts of the student and others given ones; expected caches of "
            "one kind; train on them apart"
        )
    for rollouts, scores in caches:
        settings = scores.recipe.settings
        is_drawn = settings.get("codec", {}).get("kind") == "sampled"
        wrong = "candidates" if is_drawn else "drawn"
        problem = None
        own = [part.kind for part in objectives if part.is_sampled or part.reads == "draws"]
        if is_given([(rollouts, scores)]) and own:
            problem = f"its rollouts are given, and objective {own[0]} needs draws of the student"
        elif settings.get("unscored") and set(needed) != {"completion"}:
            problem = "nobody scored its rollouts, which serve objective ce alone"
        elif wrong in needed:
            held = "ids drawn from the teacher" if is_drawn else "ranked candidates"
            problem = f"it holds {held}, which objective {needed[wrong]} does not read"
        elif "draws" in needed and not rollouts.recipe.settings.get("extra_draws"):
            problem = f"its rollouts have no further draws, which objective {needed['draws']} reads"
        elif top_k is not None and is_drawn:
            problem = "it holds ids drawn from the teacher, which have no ranks; leave top_k out"
        elif top_k is not None and top_k > settings.get("top_k", top_k):
            if "head" not in scores.recipe.inputs:
                problem = f"it holds {settings['top_k']} candidates a token, and top_k is {top_k}"
        elif "alignment" in settings:
            problem = unserved_by_chunks(objectives, merge_terminators=merge_terminators)
        if problem is not None:
            raise UserError(f"{scores.name} cannot serve this training: {problem}")
    if len({scores.recipe.inputs.get("head") for _, scores in caches}) > 1:
        raise UserError(
            "the caches hold hidden states of several teachers, or some hold none; expected one "
            "teacher and codec hidden in all; train on them apart"
        )


def check_tokenizer(caches: Sequence[Cache], tokenizer: Any) -> None:
    """Refuse a tokenizer that gives texts other ids than that of the cached prompts."""
    if tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        own = tokenizer_digest(Path(folder))
    for rollouts, scores in caches:
        cached = Store(str(rollouts.folder.parent.parent)).tokenizer_of(rollouts)
        if cached not in (None, own):  # None: not known, as of imported rows
            raise UserError(
                f"{scores.name} is of tokenizer {cached[:16]} and the trainer's is {own[:16]}: "
                "they give texts other ids; use the student's tokenizer and model, or score again"
            )


def states_head(caches: Sequence[Cache]) -> str | None:
    """The fingerprint of the head of cached hidden states; None: none are cached."""
    return caches[0][1].recipe.inputs.get("head")


def is_given(caches: Sequence[Cache]) -> bool:
    return caches[0][0].recipe.settings.get("origin") == "given"
