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


def check_context(config: Config, student: Checkpoint, longest: int) -> None:
    """Refuse a window that some rollout could not fill, before any work.

    Args:
        config: the run.
        student: reads the prompts and writes the rollouts.
        longest: tokens of the longest prompt.

    Raises:
        UserError: prompt and window are together longer than the student's context.
    """
    window, reads = largest_window(config), context_of(config, "student", student)
    if config.replay is None and reads is not None and longest + window > reads:
        raise UserError(
            f"a prompt has {longest} tokens and a window {window}, together {longest + window}; "
            f"the student reads {reads}; lower the window or max_prompt_tokens"
        )
