"""A run's folder brought up to date with the store: metrics, reports of rounds, the summary.

Everything here is read off the artifacts, so it does not matter on which machine they were made,
nor whether by `run` or by commands of single stages: whoever finishes a round or evaluates a policy
writes the same.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from opd_stream.config import PLACEMENT, counts_rounds
from opd_stream.store.files import canonical_json, sha256
from opd_stream.store.recipe import differing_fields
from pipeline.evaluation import known_evaluation
from pipeline.reports import round_report, summary
from pipeline.run_directory import RunDirectory, is_below
from pipeline.setup import Setup
from pipeline.walk import ReplaySource, Round, checkpoint_of, probe_artifacts, walk
from stages.checkpoints import Checkpoint

read = partial(checkpoint_of, part="texts")  # what a report says of a policy needs no weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a run's folder says, and what it says it of."""

    setup: Setup
    directory: RunDirectory
    run_id: str
    _evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # fingerprint of a policy

    def write_round(self, here: Round) -> dict[str, Any]:
        """Metrics and report of a finished round; returns the report."""
        self.directory.add_metrics(here)
        report = round_report(
            here,
            self.setup.store.ids_of_run(self.run_id),
            self._evaluation(read(here.policy)),
            () if here.probe is None else probe_artifacts(self.setup, here.probe),
            self.setup.teacher,
        )
        self.directory.write_report(here.index, report)
        return report

    def write_summary(
        self, reports: list[dict[str, Any]], calls: dict[str, float]
    ) -> dict[str, Any]:
        """The run so far; returns it.

        Args:
            reports: of the finished rounds.
            calls: seconds of the calls of `run`, as `summary` takes them.
        """
        identity = self.setup.student.identity
        value = summary(
            config=self.setup.config,
            policy_0={
                "version": 0,
                "fingerprint": identity.fingerprint,
                "weights_sha256": identity.weights_sha256,
            },
            evaluation_0=self._evaluation(self.setup.student),
            reports=reports,
            calls=calls,
        )
        self.directory.write_summary(value)
        return value

    def write(self) -> None:
        """All finished rounds and the summary, whoever made them."""
        reports: list[dict[str, Any]] = []
        for here in walk(self.setup, opened=read):
            if here.policy.is_complete():
                self.directory.write_plan(here)
                reports.append(self.write_round(here))
        self.write_summary(reports, self.directory.calls())

    def share(self, here: Round) -> None:
        """Tell the store which round is worked on here, and for which run of several machines.

        What a run has cost is then known on each of its machines, and `gc` leaves it.
        """
        self.setup.store.add_to_run(
            self.run_id,
            self.directory.path,
            given(self.setup) | reached(self.setup, here),
            shared=_name_of_run(self.setup),
        )

    def _evaluation(self, student: Checkpoint) -> dict[str, Any] | None:
        found = self._evaluations.get(student.identity.fingerprint) or known_evaluation(
            self.setup.config,
            self.setup.store,
            student,
            self.setup.stop_ids,
            self.setup.store.ids_of_run(self.run_id),
        )
        if found is not None:
            self._evaluations[student.identity.fingerprint] = found
        return found


def reached(setup: Setup, here: Round) -> set[str]:
    """The names of a round's artifacts, whether they exist or not."""
    probe = () if here.probe is None else probe_artifacts(setup, here.probe)
    ahead = () if here.ahead is None else (here.ahead,)
    caches = [part for cache in (*here.caches, *ahead) for part in (cache.rollouts, cache.scores)]
    return {artifact.name for artifact in (*caches, *probe, here.policy)}


def given(setup: Setup) -> set[str]:
    """The names of what a run finds made: its prompts, and what all rounds of a replay read.

    Raises:
        UserError: some of a replay is not in the store, or not of one teacher.
    """
    config, names = setup.config, {setup.prompts.name}
    if setup.alignment is not None:
        names.add(f"prompts/{setup.alignment.inputs['prompts'][:16]}")
    if config.replay is not None:
        source = ReplaySource(setup, config.replay)
        caches = [cache for index in range(config.rounds) for cache in source.caches(index)]
        names |= {part.name for cache in caches for part in (cache.rollouts, cache.scores)}
    return names


def _name_of_run(setup: Setup) -> str:
    """Digest of what all machines of a run agree on; where files lie may differ between them.

    What a path leads to is in the recipe of the first round's policy.
    """
    config = setup.config
    settings = differing_fields(config.model_dump(), {})
    paths = [field for field, (value, _) in settings.items() if isinstance(value, Path)]
    grows = () if counts_rounds(config) else ("rounds",)
    free = (*PLACEMENT, *paths, *grows, "evaluation")
    agreed = {
        field: value
        for field, (value, _) in differing_fields(config.model_dump(mode="json"), {}).items()
        if not is_below(field, free)
    }
    return sha256(canonical_json([agreed, next(walk(setup)).policy.fingerprint]))
