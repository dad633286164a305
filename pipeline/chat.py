"""A policy's answers to what is typed: `opd-stream chat`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, SamplingSettings
from opd_stream.errors import UserError
from opd_stream.fetching import fetch
from opd_stream.messages import Turn, check_unicode
from opd_stream.model_config import read_model_config
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Renderer
from opd_stream.store.policy import known_identity
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.types import PromptBatch
from pipeline.evaluation import open_policy
from pipeline.export import trained_policy
from pipeline.run_folder import RunFolder
from pipeline.setup import open_store

_NAME = "what was typed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A policy that answers, under the template of its run's prompts."""

    folder: Path
    tokenizer: Any
    template: RawTemplate | ChatTemplate
    engine: Engine
    settings: SamplingSettings

    @property
    def keeps_turns(self) -> bool:
        """Whether it is told of earlier turns; a raw template writes one text."""
        return isinstance(self.template, ChatTemplate)

    def answers(self, turns: list[Turn], samples: int, seed: int) -> list[str]:
        """What it says next, so many times.

        Raises:
            UserError: the template does not take the turns, or they leave no room in its context.
        """
        text = turns[-1]["content"]
        check_unicode("the prompt", text)
        chat = tuple(turns) if self.keeps_turns else None
        prompt = Prompt(prompt_id=_NAME, text=text, answer=None, turns=chat)
        ids = Renderer(self.template, self.tokenizer).ids(prompt)
        if not len(ids):
            raise UserError("the prompt is empty; expected some text")
        rollouts = self.engine.sample(
            PromptBatch(prompt_id=(_NAME,), prompt_ids=(ids.astype(np.int32),)),
            replace(self.settings, seed=seed),
            samples_per_prompt=samples,
        )
        return [
            self.tokenizer.decode(found, skip_special_tokens=True)
            for found in rollouts.completion_ids
        ]


def open_writer(
    place: str, version: int | None, *, max_new_tokens: int, temperature: float
) -> Writer:
    """A policy of a run, or any checkpoint, ready to answer.

    Args:
        place: the folder of a run, or a Hugging Face folder, hub model or GGUF file.
        version: of the run's policy, 0 for the initial student; None: the last of a finished run.
        max_new_tokens: of an answer.
        temperature: 0 takes the most probable token.

    Raises:
        UserError: there is no such policy, or nothing ends its answers.
    """
    run = RunFolder(Path(place))
    if (run.path / "run.json").is_file():
        config = run.config()
        folder = config.student.folder if version == 0 else _trained(run, version)
        template, dtype = config.prompts.template, config.student.dtype
        stop_ids = open_policy(config, open_store(config), folder)[1].stop_ids
    elif version is not None:
        raise UserError(f"{place} is no run; expected one with --policy-version; leave that out")
    else:
        folder = fetch(Path(place))
        known_identity(folder, cache=folder, most_bytes=0)  # refuses what is no checkpoint
        model, dtype = read_model_config(folder), "float32"
        stop_ids = tuple(sorted(set().union(*model.terminators.values())))
        has_chat = bool(getattr(open_tokenizer(folder), "chat_template", None))
        template = ChatTemplate() if has_chat else RawTemplate()
    if not stop_ids:
        raise UserError(
            f"policy {folder} names no eos_token_id; expected one in generation_config.json or "
            "config.json; add it"
        )
    return Writer(
        folder=folder,
        tokenizer=open_tokenizer(folder),
        template=template,
        engine=open_engine(engine="transformers", folder=folder, dtype=dtype, batch_rows=16),
        settings=SamplingSettings(
            window_tokens=max_new_tokens, stop_ids=stop_ids, temperature=temperature
        ),
    )


def _trained(run: RunFolder, version: int | None) -> Path:
    return trained_policy(run, version)[1].folder("model")
