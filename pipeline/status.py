"""What of a run is in the store, round by round, read from the store alone."""

from typing import Any

from opd_stream.config import Config
from opd_stream.store.artifact import Artifact
from opd_stream.store.policy import PolicyArtifact
from pipeline.setup import Setup, open_setup
from pipeline.walk import walk


def status_lines(config: Config) -> list[str]:
    """One line a round, and for the first missing artifact how it differs from the nearest one.

    Raises:
        UserError: the checkpoints or prompts of the run cannot be opened.
    """
    setup = open_setup(config)
    lines: list[str] = []
    for here in walk(setup):
        lines.append(
            f"round {here.index}: window {here.plan.window_tokens}; "
            f"generate {_units(here.rollouts)}; score {_units(here.scores)}; "
            f"train {'complete' if here.policy.is_complete() else 'not complete'}"
        )
        for artifact in (here.rollouts, here.scores, here.policy):
            if not artifact.is_complete():
                lines += _nearest(setup, artifact)
                break
    waiting = config.rounds - sum(line.startswith("round") for line in lines)
    if waiting:
        lines.append(f"{waiting} more rounds wait for the policy before them")
    return lines


def _units(artifact: Artifact) -> str:
    if artifact.is_complete():
        return "complete"
    if not artifact.is_started():
        return "not started"
    return f"{len(artifact.commits())} of {len(artifact.units())} units"


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
