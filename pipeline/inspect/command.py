"""`opd-stream inspect`: checks what was asked, reads, and shows it."""

from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.files import publish
from opd_stream.token_figures import FIGURES
from opd_stream.token_text import TokenText
from pipeline.inspect.source import find, open_round
from pipeline.inspect.view import Reading, RolloutView, view_of
from pipeline.inspect.worst import Worst, worst_rollouts
from pipeline.run_directory import RunDirectory
from pipeline.setup import masked_ids
from stages.checkpoints import open_vocabulary


def inspect_rollout(
    directory: RunDirectory,
    config: Config,
    *,
    round_index: int,
    prompt_id: str,
    sample: int = 0,
    cache: int | None = None,
    by: str = "reverse_kl",
) -> RolloutView:
    """One rollout of a round.

    Args:
        directory: of the run.
        config: of the run; its store is read.
        round_index: from 0.
        prompt_id: as in the prompts artifact.
        sample: which of the prompt's rollouts, from 0.
        cache: which of the round's caches; None: the newest that has the rollout.
        by: a name of `FIGURES`.

    Raises:
        UserError: any of them is not there, or not told by the scores.
    """
    _check_by(by)
    reading = open_reading(directory, config, round_index)
    return view_of(reading, find(reading.source, prompt_id, sample, cache), by)


def inspect_worst(
    directory: RunDirectory, config: Config, *, round_index: int, count: int, by: str = "reverse_kl"
) -> list[Worst]:
    """The rollouts of a round with the largest mean of a figure; see `inspect_rollout`."""
    _check_by(by)
    if count < 1:
        raise UserError(f"--worst is {count}; expected how many rollouts to list, at least 1")
    return worst_rollouts(open_reading(directory, config, round_index), count, by)


def open_reading(directory: RunDirectory, config: Config, round_index: int) -> Reading:
    """The round with its tokenizer."""
    source = open_round(directory, config, round_index)
    tokenizer = open_vocabulary(source.tokenizer_folder().resolve())
    return Reading(
        source=source, text=TokenText(tokenizer), masked_ids=masked_ids(config, tokenizer)
    )


def check_question(
    prompt_id: str | None, worst: int | None, html: Path | None, has_choice: bool
) -> None:
    """Refuse a command line that asks for nothing, or for two things at once.

    Raises:
        UserError: says which options go together.
    """
    if (prompt_id is None) == (worst is None):
        found = "neither" if prompt_id is None else "both"
        raise UserError(
            f"{found} of --prompt and --worst given; expected one: --prompt ID shows a rollout, "
            "--worst N lists those to look at"
        )
    if worst is not None and (html is not None or has_choice):
        raise UserError(
            "--worst lists rollouts; --html, --sample and --cache belong to --prompt ID; "
            "leave them out"
        )
    if html is None:
        return
    if html.is_dir() or html.suffix not in (".html", ".htm") or not html.parent.is_dir():
        raise UserError(
            f"--html is {html}; expected a file to write in a folder that is there, such as "
            "rollout.html"
        )


def write_page(view: RolloutView, path: Path) -> str:
    """Write the page of a rollout; returns the line to print."""
    from pipeline.inspect.page import page

    data = page(view).encode()
    publish(path, data)
    return f"{path}: {len(data):,} bytes; open it in a browser"


def _check_by(by: str) -> None:
    if by not in FIGURES:
        raise UserError(f"--by is {by!r}; expected one of {', '.join(FIGURES)}")
