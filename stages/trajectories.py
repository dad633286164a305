"""Rollouts of many turns: the student writes one, the environment answers, and so on.

A trajectory is one row: its completion holds the student's turns as they were drawn and, between
them, what the chat template makes of the environment's answers; `loss_mask` says which are which.
An engine continues the row with `extend`, so that the k-th token of a completion uses the k-th
number of the row's own random stream, whoever wrote the tokens before it.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.engines.base import Engine, SamplingSettings
from opd_stream.environments import (
    Asked,
    Environment,
    OpenEnvironment,
    environment_recipe,
    open_environment,
)
from opd_stream.errors import UserError
from opd_stream.messages import Turn, is_turns, turns_of, turns_text
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Renderer, template_settings
from opd_stream.section import is_list
from opd_stream.store.lines import opened
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import prompts_batch
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.trajectories import TurnWriter, refuse_unfit
from opd_stream.types import FinishReason, RolloutBatch, last_turn

Ids = NDArray[np.integer[Any]]


def trajectories_recipe(
    environment: Environment, template: RawTemplate | ChatTemplate
) -> dict[str, Any]:
    """What of an environment, and of the template that writes its turns, decides rollouts.

    Raises:
        UserError: the function cannot be imported, or the template is none of conversations.
    """
    if isinstance(template, RawTemplate):
        raise UserError(
            "rollouts.environment is set and template.kind is raw, which knows no turns; expected "
            "a chat template, which writes the environment's; set template={kind: chat}"
        )
    refuse_unfit(template, "rollouts.environment")
    settings = template_settings(template)
    if template.file is not None:  # workers may not have it
        with opened(template.file) as file:
            settings["jinja"] = file.read().decode("utf-8-sig", "replace")
    return {**environment_recipe(environment), "template": settings}


class Trajectories:
    """An environment with the template and the tokenizer that write its turns.

    Raises:
        UserError: its function is another one here than where the recipe was written.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        tokenizer: Any,
        placed: Environment | None,
    ) -> None:
        """Open what the part `environment` of a recipe names; `placed` says how it is called."""
        names = ("kind", "options", "max_turns")
        own = {} if placed is None else placed.model_dump(include={"seconds", "at_once"})
        settings = Environment.model_validate({**{n: recipe[n] for n in names}, **own})
        here = environment_recipe(settings)
        if differing := sorted(name for name in here if here[name] != recipe.get(name)):
            raise UserError(
                f"environment {settings.kind} differs on this machine in {', '.join(differing)}; "
                "expected the same function wherever the student samples; use one version"
            )
        self.environment: OpenEnvironment = open_environment(settings)
        self.stop_ids = tuple(stop_ids)
        template: dict[str, Any] = dict(recipe["template"])
        jinja = template.pop("jinja", None)
        chat = ChatTemplate.model_validate({**template, "file": None})
        self.tokenizer = tokenizer
        self.renderer = Renderer(chat, tokenizer, jinja=jinja)
        self.writer = TurnWriter(self.renderer, tokenizer, stop_ids)

    @classmethod
    def of(cls, rollouts: Recipe, folder: Path, placed: Environment | None) -> Self:
        """Those of a recipe of rollouts; `folder` has the student's tokenizer."""
        settings = rollouts.settings
        return cls(
            settings["environment"],
            stop_ids=settings["stop_ids"],
            tokenizer=open_tokenizer(folder),
            placed=placed,
        )

    def try_out(self, prompts: pa.Table) -> None:
        """Try template and function before paid work: on the first prompt, with an empty answer.

        Raises:
            UserError: as `TurnWriter.check` and `OpenEnvironment.answers`.
        """
        self.writer.check()
        first = prompts.slice(0, 1).select(["prompt_id", "text", "answer"]).to_pylist()
        for row in first:
            prompt = prompt_of(row["prompt_id"], row["text"])
            messages = [*self.renderer.turns(prompt), {"role": "assistant", "content": ""}]
            asked = Asked(prompt.prompt_id, 0, 1, messages, row["answer"])
            (turns,) = self.environment.answers([asked])
            if turns is not None:
                self.writer.ids(prompt, messages[-1:], turns)

    def sample(
        self,
        engine: Engine,
        prompts: pa.Table,
        settings: SamplingSettings,
        *,
        samples_per_prompt: int,
    ) -> RolloutBatch:
        """Trajectories of some prompts, up to the window and the limit of turns.

        Raises:
            UserError: as `Engine.sample`, `OpenEnvironment.answers` and `TurnWriter.ids`.
        """
        batch = engine.sample(
            prompts_batch(prompts), settings, samples_per_prompt=samples_per_prompt
        )
        columns = (prompts[name].to_pylist() for name in ("prompt_id", "text", "answer"))
        told = {name: (text, answer) for name, text, answer in zip(*columns, strict=True)}
        rows = [_Row.first(batch, row, *told[name]) for row, name in enumerate(batch.prompt_id)]
        for turn in range(1, self.environment.settings.max_turns):
            asked = [row for row in rows if row.is_asked(turn)]
            if not asked:
                break
            going = self._answered(asked, turn, settings)
            if not going:
                continue
            before = _batch(batch, going)
            after = engine.extend(before, settings)
            for place, row in enumerate(going):
                row.take(after, place)
        return replace(
            _batch(batch, rows),
            finish_reason=tuple(row.finish_reason for row in rows),
            loss_mask=tuple(row.mask for row in rows),
        )

    def _answered(
        self, asked: Sequence["_Row"], turn: int, settings: SamplingSettings
    ) -> list["_Row"]:
        """Ask the environment; returns the rows in which the student goes on."""
        for row in asked:
            row.said.append({"role": "assistant", "content": self._text(row.last_turn())})
        answers = self.environment.answers(
            [
                Asked(
                    row.prompt.prompt_id,
                    row.sample_index,
                    turn,
                    [*self.renderer.turns(row.prompt), *row.said],
                    row.reference,
                )
                for row in asked
            ]
        )
        going: list[_Row] = []
        for row, turns in zip(asked, answers, strict=True):
            if turns is None:
                continue
            ids = self.writer.ids(row.prompt, row.said, turns)
            if len(row.ids) + len(ids) >= settings.window_tokens:
                row.finish_reason = "length"  # no room for another turn
                continue
            row.said += turns
            row.hear(ids, settings.student_top_k)
            going.append(row)
        return going

    def _text(self, ids: Ids) -> str:
        """A turn of the student as text, without what ended it."""
        inside = ids[:-1] if len(ids) and int(ids[-1]) in self.stop_ids else ids
        return self.tokenizer.decode(
            inside.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


@dataclass(slots=True, kw_only=True)
class _Row:
    """A trajectory that is being written."""

    number: int  # in the first batch
    prompt: Prompt
    reference: str | None
    sample_index: int
    ids: Ids
    logprobs: NDArray[np.float32]
    tops: Ids | None
    mask: NDArray[np.bool_]
    finish_reason: FinishReason
    turns: int = 1  # of the student
    said: list[Turn] = field(default_factory=list[Turn])  # behind the prompt

    @classmethod
    def first(cls, batch: RolloutBatch, row: int, text: str, reference: str | None) -> "_Row":
        """After the student's first turn."""
        own = batch.student_top_ids
        return cls(
            number=row,
            prompt=prompt_of(batch.prompt_id[row], text),
            reference=reference,
            sample_index=int(batch.sample_index[row]),
            ids=batch.completion_ids[row],
            logprobs=batch.behavior_logprobs[row],
            tops=None if own is None else own[row],
            mask=np.ones(len(batch.completion_ids[row]), np.bool_),
            finish_reason=batch.finish_reason[row],
        )

    def is_asked(self, turn: int) -> bool:
        """Whether the student has just ended this turn of its own."""
        return self.turns == turn and self.finish_reason == "stop"

    def last_turn(self) -> Ids:
        """The ids of the student's last turn."""
        return self.ids[last_turn(self.mask)]

    def hear(self, ids: Ids, student_top_k: int) -> None:
        """Add what others say; nobody drew it."""
        self.ids = np.concatenate([self.ids, ids])
        self.logprobs = np.append(self.logprobs, np.zeros(len(ids), np.float32))
        self.mask = np.append(self.mask, np.zeros(len(ids), np.bool_))
        if self.tops is not None:
            nobodys = np.tile(np.arange(student_top_k), (len(ids), 1))
            self.tops = np.concatenate([self.tops, nobodys])

    def take(self, batch: RolloutBatch, place: int) -> None:
        """Take over the student's next turn, at the end of a row of a batch."""
        new = len(batch.completion_ids[place]) - len(self.ids)
        self.ids, self.logprobs = batch.completion_ids[place], batch.behavior_logprobs[place]
        self.tops = None if batch.student_top_ids is None else batch.student_top_ids[place]
        self.mask = np.append(self.mask, np.ones(new, np.bool_))
        self.finish_reason = batch.finish_reason[place]
        self.turns += 1


def _batch(first: RolloutBatch, rows: Sequence[_Row]) -> RolloutBatch:
    """Rows to be continued."""
    tops = [row.tops for row in rows if row.tops is not None]
    return RolloutBatch(
        prompt_id=tuple(row.prompt.prompt_id for row in rows),
        sample_index=np.array([row.sample_index for row in rows], np.int32),
        prompt_ids=tuple(first.prompt_ids[row.number] for row in rows),
        completion_ids=tuple(row.ids for row in rows),
        behavior_logprobs=tuple(row.logprobs for row in rows),
        finish_reason=("length",) * len(rows),
        student_top_ids=tuple(tops) or None,
    )


def prompt_of(name: str, text: str) -> Prompt:
    """A prompt from the text that a prompts artifact keeps: of messages that is their JSON."""
    turns: Any = None
    if text.startswith("[{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if is_list(found) and is_turns(found) and turns_text(tuple(found)) == text:
            with contextlib.suppress(UserError):  # a text that only looks like messages
                turns = turns_of(found, f"prompt {name!r}")
    return Prompt(prompt_id=name, text=text, answer=None, turns=turns)
