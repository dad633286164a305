"""What a model reads at once, against the prompts and the windows of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.files import read_json
from opd_stream.windows import AdaptiveWindow
from pipeline.plan import plan_round
from stages.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextUse:
    """The longest text that a model reads at once, and the most that it can.

    Example:
        >>> ContextUse(role="student", prompt_tokens=70, window_tokens=208, limit=2048).fits
        True
    """

    role: str
    prompt_tokens: int  # of the longest prompt
    window_tokens: int
    limit: int | None  # tokens; None: the checkpoint names none
    kept: int = 0  # tokens of the limit that the engine keeps for itself

    @property
    def fits(self) -> bool:
        """Whether the text can be read whole."""
        together = self.prompt_tokens + self.window_tokens
        return self.limit is None or together + self.kept <= self.limit

    def __str__(self) -> str:
        together = self.prompt_tokens + self.window_tokens
        limit = "names no limit" if self.limit is None else f"reads {self.limit}"
        return (
            f"a prompt has {self.prompt_tokens} tokens and a window {self.window_tokens}, together "
            f"{together}; the {self.role} {limit}{', of which vLLM keeps one' if self.kept else ''}"
        )


def training_contexts(
    config: Config, student: Checkpoint, teacher: Checkpoint | None, longest: int
) -> Iterator[ContextUse]:
    """What each model of a run reads at once; a teacher with another tokenizer is left out."""
    if config.replay is not None:
        return
    window = largest_window(config)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None or (role == "teacher" and config.scores.alignment is not None):
            continue
        scores_by_vllm = config.teacher is not None and config.teacher.engine == "vllm"
        yield ContextUse(
            role=role,
            prompt_tokens=longest,
            window_tokens=window,
            limit=context_of(config, role, model),
            kept=int(role == "teacher" and scores_by_vllm),
        )


def check_context(
    config: Config, student: Checkpoint, teacher: Checkpoint | None, longest: int
) -> None:
    """Refuse a window that some rollout could not fill or be scored with, before any work.

    Raises:
        UserError: prompt and window are together longer than the context of one of the models.
    """
    for use in training_contexts(config, student, teacher, longest):
        if not use.fits:
            raise UserError(f"{use}; lower the window or max_prompt_tokens")


def largest_window(config: Config) -> int:
    """New tokens that a rollout of any round may have, if no drift ends a round early."""
    window = config.rollouts.window
    if isinstance(window, AdaptiveWindow):
        return window.max_window_tokens
    planned = plan_round(config, round_index=0, first_step=0).planned_steps
    last = config.rounds - 1
    return plan_round(config, round_index=last, first_step=last * planned).window_tokens


def context_of(config: Config, role: str, model: Checkpoint) -> int | None:
    """Tokens that the student or the teacher reads at once; None: the checkpoint names no limit."""
    value = read_json(model.folder / "config.json")
    found = value.get("max_position_embeddings")
    found = found or value.get("text_config", {}).get("max_position_embeddings")
    settings = config.student if role == "student" else config.teacher
    if settings is not None and settings.engine == "vllm" and settings.vllm.max_context:
        return min(settings.vllm.max_context, found or settings.vllm.max_context)
    return found
