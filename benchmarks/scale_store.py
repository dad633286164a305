"""A finished run of many rounds, written through the store's own records without a model.

    python -m benchmarks.scale_store CONFIG rounds=1000 store=DIR ...  # after its first round
    python -m benchmarks.scale_store CONFIG rounds=1000 store=DIR ... --kill

The first round is a real one, with engines that cost nothing; every other round gets its units and
its policy as links, under records of its own. Nothing is synced: what is lost with the power is
made again.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from opd_stream.config_file import load_config
from opd_stream.store.artifact import Artifact, Manifest, summed_counts
from opd_stream.store.files import remove_file, sha256
from opd_stream.store.policy import METRICS, PolicyArtifact, PolicyManifest
from opd_stream.store.sealed import publish_new_record, publish_record, record_bytes
from pipeline.rounds import Round, rounds
from pipeline.setup import Setup, open_to_look

STATES_LEFT = 2  # policies at the end that training can go on from


def build(setup: Setup) -> None:
    """Write all rounds that the store of a run lacks, whose first one is complete."""
    os.fsync = lambda _: None
    first: Round | None = None
    for round_ in rounds(setup):
        first = first or round_
        if round_.policy.is_complete():
            continue
        for source, step in zip(first.steps[:-1], round_.steps[:-1], strict=True):
            _copy_units(source.shards, step.shards)
        is_state_left = round_.index >= setup.config.rounds - STATES_LEFT
        _copy_policy(first.policy, round_.policy, round_, is_state_left=is_state_left)


def _copy_units(source: Artifact, target: Artifact) -> None:
    layout = source.layout()
    target.create(rows=layout.rows, rows_per_unit=layout.rows_per_unit)
    commits = source.manifest().units
    (target.folder / "units").mkdir()
    for commit in commits:
        os.link(source.folder / commit.file, target.folder / commit.file)
        path = target.folder / "units" / f"{commit.unit:05d}.json"
        path.write_bytes(record_bytes(commit, path))
    counts = summed_counts(commits)
    manifest = Manifest.of(target.recipe, units=commits, counts=counts)
    publish_new_record(target.folder / "manifest.json", manifest)


def _copy_policy(
    source: PolicyArtifact, target: PolicyArtifact, round_: Round, *, is_state_left: bool
) -> None:
    made, folder, attempt = source.manifest(), source.folder("name"), target.new_attempt()
    files, dropped = dict(made.files), dict(made.dropped)
    for name in made.files:
        if "/" in name and not is_state_left:
            dropped[name] = files.pop(name)
            continue
        (attempt / name).parent.mkdir(exist_ok=True)
        if name != METRICS:
            os.link(folder / name, attempt / name)
    metrics = b"".join(_renumbered(source, round_))
    (attempt / METRICS).write_bytes(metrics)
    files[METRICS] = sha256(metrics)
    record = PolicyManifest.of(
        target.recipe,
        folder=attempt.name,
        identity=made.identity,
        **asdict(made.checkpoint_identity),
        files=files,
        dropped=dropped,
        outcome=made.outcome,
    )
    publish_new_record(target.artifact_folder / "manifest.json", record)


def _renumbered(source: PolicyArtifact, round_: Round) -> Iterator[bytes]:
    """The steps of the first round as steps of another one."""
    for number, line in enumerate((source.metrics() or b"").splitlines()):
        step = json.loads(line) | {"round": round_.index, "step": round_.plan.first_step + number}
        yield json.dumps(step).encode() + b"\n"


def kill_last_round(setup: Setup) -> None:
    """Leave of the last round what a kill in the middle of its scoring leaves."""
    (*_, last) = rounds(setup)
    if last.previous is not None:
        _give_state_back(last.previous, last.policy)
    remove_file(last.policy.artifact_folder / "manifest.json")
    (cache,) = last.caches
    remove_file(cache.scores.shards.folder / "manifest.json")
    for unit in range(len(cache.scores.shards.units()) // 2):
        cache.scores.shards.invalidate(unit)


def _give_state_back(policy: PolicyArtifact, later: PolicyArtifact) -> None:
    """As long as the next round is not complete, the state of a policy is there."""
    made, source, target = policy.manifest(), later.folder("name"), policy.folder("name")
    for name in made.dropped:
        (target / name).parent.mkdir(exist_ok=True)
        os.link(source / name, target / name)
    changed = {"files": {**made.files, **made.dropped}, "dropped": {}}
    publish_record(policy.artifact_folder / "manifest.json", made.model_copy(update=changed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", help="KEY=VALUE")
    parser.add_argument("--kill", action="store_true", help="the last round, in its scoring")
    arguments = parser.parse_args()
    setup = open_to_look(load_config(arguments.config, arguments.settings))
    (kill_last_round if arguments.kill else build)(setup)


if __name__ == "__main__":
    main()
