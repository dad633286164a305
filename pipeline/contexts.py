"""What a model reads at once, against the prompts and the windows of a run."""

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.files import read_json
from pipeline.plan import plan_round
from stages.checkpoints import Checkpoint


def largest_window(config: Config) -> int:
    """New tokens that a rollout of any round may have, if no drift ends a round early."""
    window = config.rollouts.window
    if window.kind == "adaptive":
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


def check_context(
    config: Config, student: Checkpoint, teacher: Checkpoint | None, longest: int
) -> None:
    """Refuse a window that some rollout could not fill or be scored with, before any work.

    Args:
        config: the run.
        student: reads the prompts and writes the rollouts.
        teacher: reads both; with another tokenizer its lengths are its own, and known later.
        longest: tokens of the longest prompt.

    Raises:
        UserError: prompt and window are together longer than the context of one of them.
    """
    if config.replay is not None:
        return
    window = largest_window(config)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None or (role == "teacher" and config.scores.alignment is not None):
            continue
        reads = context_of(config, role, model)
        together = longest + window
        more = role == "teacher" and config.teacher is not None and config.teacher.engine == "vllm"
        if reads is not None and together + more > reads:
            raise UserError(
                f"a prompt has {longest} tokens and a window {window}, together {together}; the "
                f"{role} reads {reads}{', of which vLLM keeps one' if more else ''}; lower the "
                "window or max_prompt_tokens"
            )
