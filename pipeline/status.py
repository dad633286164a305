"""What of a run is in the store, round by round, read from the store alone."""

import sys
from typing import Any

from rich.console import Console

from opd_stream.config import Config
from opd_stream.store.artifact import Artifact
from opd_stream.store.policy import PolicyArtifact
from pipeline.run_directory import RunDirectory
from pipeline.run_status import StatusReader
from pipeline.setup import Setup, open_to_look
from pipeline.status_table import status_json, table_of, watch
from pipeline.walk import named, walk


def status_lines(config: Config) -> list[str]:
    """One line a round, and for the first missing artifact how it differs from the nearest one.

    Raises:
        UserError: the checkpoints or prompts of the run cannot be opened.
    """
    return lines_of(open_to_look(config))


def lines_of(setup: Setup) -> list[str]:
    """The same of a run that is open."""
    lines: list[str] = []
    for here in walk(setup, opened=named):
        lines.append(
            f"round {here.index}: window {here.plan.window_tokens}; "
            f"generate {_units([cache.rollouts for cache in here.caches])}; "
            f"score {_units([cache.scores for cache in here.caches])}; "
            f"train {'complete' if here.policy.is_complete() else 'not complete'}"
        )
        caches = [part for cache in here.caches for part in (cache.rollouts, cache.scores)]
        for artifact in (*caches, here.policy):
            if not artifact.is_complete():
                lines += _nearest(setup, artifact)
                break
    waiting = setup.config.rounds - sum(line.startswith("round") for line in lines)
    if waiting:
        later = "1 more round waits" if waiting == 1 else f"{waiting} more rounds wait"
        lines.append(f"{later} for the policy of the round before")
    return lines


def print_status(
    config: Config, directory: RunDirectory, *, as_json: bool, every: float | None
) -> None:
    """Print table and lines, or one JSON object; with `every` seconds, keep the table up to date.

    In a pipe everything is printed once.
    """
    setup = open_to_look(config)
    reader = StatusReader(setup, directory)
    if as_json:
        sys.stdout.write(status_json(reader.read(), lines_of(setup)) + "\n")
        return
    is_terminal = sys.stdout.isatty()
    console = Console() if is_terminal else Console(width=140, force_terminal=False)
    if every is not None and is_terminal:
        watch(reader.read, console, seconds=every)
        return
    console.print(table_of(reader.read()))
    for line in lines_of(setup):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _units(artifacts: list[Artifact]) -> str:
    if all(artifact.is_complete() for artifact in artifacts):
        return "complete"
    started = [artifact for artifact in artifacts if artifact.is_started()]
    if not started:
        return "not started"
    done = sum(len(artifact.commits()) for artifact in started)
    return f"{done} of {sum(len(artifact.units()) for artifact in started)} units"


def _nearest(setup: Setup, artifact: Artifact | PolicyArtifact) -> list[str]:
    found = setup.store.nearest(artifact.recipe)
    if found is None:
        return [f"  {artifact.name} is not complete; the store has no other {artifact.recipe.kind}"]
    other, fields = found
    lines = [
        f"  {artifact.name} is not complete; the nearest is "
        f"{other.kind}/{other.fingerprint[:16]}, which differs in:"
    ]
    return [
        *lines,
        *(
            f"    {name}: {_short(old)} there, {_short(new)} here"
            for name, (old, new) in fields.items()
        ),
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:16]}…{text[-1]}"
