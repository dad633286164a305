"""Sample texts of a run: a rollout of its first, middle and last finished round, from the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from opd_stream.errors import UserError
from opd_stream.tokens import visible
from pipeline.inspect.command import command_of, inspect_rollout, open_reader
from pipeline.inspect.view import RolloutView
from pipeline.report.read import Run
from pipeline.run_folder import RunFolder

TRIES = 8  # prompts of a round, since the first ones may have no scores
BY = "reverse_kl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A rollout as text."""

    round_index: int
    view: RolloutView

    @property
    def parts(self) -> list[tuple[int, str]]:
        """The completion in pieces of one colour: (level of the figure, text)."""
        view = self.view
        levels = [max(0, view.figure.level(float(value))) for value in view.values]
        pairs = zip(levels, view.pieces, strict=True)
        groups = groupby(pairs, key=lambda pair: pair[0])
        return [(level, "".join(visible(piece) for _, piece in group)) for level, group in groups]

    @property
    def said(self) -> str:
        """What is known of it, in a line."""
        view = self.view
        verdict = "" if view.verdict is None else f"; {view.verdict}"
        return f"{view.figure.name} {view.mean:.4f}; {view.finish}{verdict}"

    @property
    def command(self) -> str:
        """The command that shows its tokens."""
        view = self.view
        return command_of(view.reader, view.located.cache, view.row, BY)


def sample_rounds(run: Run) -> list[int]:
    """The first, the middle and the last finished round."""
    done = sorted(report.round for report in run.rounds)
    return sorted({done[0], done[len(done) // 2], done[-1]}) if done else []


def samples(run: Run) -> tuple[list[Sample], str]:
    """A rollout a round, of one prompt where the rounds share one; and what is to be said of it."""
    rounds = sample_rounds(run)
    if not rounds:
        return [], "No round is finished yet."
    try:
        names = {index: _prompts(run, index) for index in rounds}
        shared = set.intersection(*({*each} for each in names.values()))
        found = [
            Sample(round_index=index, view=_first(run, index, each, shared))
            for index, each in names.items()
        ]
    except (UserError, OSError) as error:
        return [], f"There are no sample texts: {error}."
    one = len({sample.view.row.prompt_id for sample in found}) == 1
    what = "The same prompt in each." if one else "The rounds drew different prompts."
    return found, f"{what} Marked: tokens that the teacher would not have written."


def _prompts(run: Run, round_index: int) -> list[str]:
    """The first prompts of a round."""
    cache = open_reader(RunFolder(run.folder), run.config, round_index, BY).caches[-1]
    table = cache.rollouts.read_unit(cache.units[0])
    return list(dict.fromkeys(table["prompt_id"].to_pylist()))


def _first(run: Run, round_index: int, names: Sequence[str], shared: set[str]) -> RolloutView:
    """The first rollout with scores, if it can be of a prompt that other rounds have too.

    Raises:
        UserError: none of the first ones has scores.
    """
    last = UserError(f"round {round_index} has no rollouts")
    for name in sorted(names, key=lambda name: name not in shared)[:TRIES]:
        try:
            folder = RunFolder(run.folder)
            return inspect_rollout(folder, run.config, round_index=round_index, prompt_id=name)
        except UserError as error:
            last = error
    raise last
