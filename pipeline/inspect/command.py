"""`opd-stream inspect`: checks what was asked and reads it; `terminal` and `page` show it."""

import heapq
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.reader import ScoredRow
from opd_stream.tokens import FIGURES, TokenText
from pipeline.inspect.source import LocatedRow, RoundCache, find, open_round, whole_shards
from pipeline.inspect.view import RolloutView, RoundReader, mean_of
from pipeline.run_folder import RunFolder
from pipeline.setup import masked_ids
from stages.checkpoints import open_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRollout:
    """A rollout of the list."""

    view: RolloutView
    command: str  # that opens it


def inspect_rollout(
    folder: RunFolder,
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
        folder: of the run.
        config: of the run; its store is read.
        round_index: from 0.
        prompt_id: as in the prompts artifact.
        sample: which of the prompt's rollouts, from 0.
        cache: which of the round's caches; None: the newest that has the rollout.
        by: a name of `FIGURES`.

    Raises:
        UserError: one of them does not exist, or the scores do not hold the figure.
    """
    reader = open_reader(folder, config, round_index, by)
    return reader.view(find(reader.source, prompt_id, sample, cache), by)


def inspect_worst(
    folder: RunFolder, config: Config, *, round_index: int, count: int, by: str = "reverse_kl"
) -> list[WorstRollout]:
    """The `count` rollouts with the largest mean over the tokens that train, the largest first.

    Rows are read in order and let go, so memory does not grow with the round. Of equal means the
    earlier row comes first; a row of which no token trains is left out.

    Raises:
        UserError: as `inspect_rollout`, or a shard is damaged.
    """
    if count < 1:
        raise UserError(f"--worst is {count}; expected how many rollouts to list, at least 1")
    reader = open_reader(folder, config, round_index, by)
    worst: list[tuple[float, int, RoundCache, ScoredRow]] = []  # a heap: mean, -place, ...
    place = 0
    with whole_shards():
        for cache in reader.source.caches:
            rows = cache.rows()
            for row in (rows[position] for position in range(len(rows))):
                mean = mean_of(reader.figures(cache, row, by)[by], reader.trains(row))
                place -= 1
                if not math.isnan(mean):
                    push = heapq.heappush if len(worst) < count else heapq.heappushpop
                    push(worst, (mean, place, cache, row))
    return [
        WorstRollout(
            view=reader.view(LocatedRow(cache=cache, row=row), by),
            command=_command(reader, cache, row, by),
        )
        for _, _, cache, row in sorted(worst, key=lambda entry: entry[:2], reverse=True)
    ]


def open_reader(folder: RunFolder, config: Config, round_index: int, by: str) -> RoundReader:
    """The round with its tokenizer."""
    if by not in FIGURES:
        raise UserError(f"--by is {by!r}; expected one of {', '.join(FIGURES)}")
    source = open_round(folder, config, round_index)
    tokenizer = open_vocabulary(source.tokenizer_folder().resolve())
    return RoundReader(
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
            f"--html is {html}; expected a file to write in a folder that exists, such as "
            "rollout.html"
        )


def _command(reader: RoundReader, cache: RoundCache, row: ScoredRow, by: str) -> str:
    source = reader.source
    words = ["opd-stream", "inspect", str(source.run), "--round", str(source.round_index)]
    words += ["--prompt", row.prompt_id, "--sample", str(row.sample_index)]
    if len(source.caches) > 1:
        words += ["--cache", str(cache.number)]
    if by != next(iter(FIGURES)):
        words += ["--by", by]
    return shlex.join(words)
