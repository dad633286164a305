"""A round is a list of steps: each an artifact, who makes it, and what must be complete first.

Everything that asks about a round is a fold over its steps: `run` makes those that are incomplete,
a single stage makes those of its kind, `--follow` waits for their needs, `gc` leaves their
artifacts, status is the pace of each, `plan` the cost of each, and a report sums their commit
records. A new kind of step is a `StepKind` and a line where the steps of a round are listed
(`round_steps` in `pipeline/rounds.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from opd_stream.store.artifact import Artifact, Commit, summed_counts
from opd_stream.store.policy import PolicyArtifact
from stages.checkpoints import Checkpoint

Stage = Literal["generate", "score", "train", "evaluate"]


@dataclass(frozen=True, slots=True)
class StepKind:
    """What tables call a step, and the stage (command and pool) that makes it."""

    name: str
    stage: Stage
    author: Literal["student", "teacher"] = "student"  # whose pool samples, of rollouts


GENERATE = StepKind("generate", "generate")  # fresh rollouts
GIVEN = StepKind("given", "generate")  # completions that the prompts' rows have
TEACHER_GIVEN = StepKind("teacher's rollouts", "generate", "teacher")  # in place of the student's
EXTEND = StepKind("extend", "generate")  # cached rollouts, continued to a longer window
PROBE = StepKind("probe", "generate")  # unfinished rollouts, continued to full length
SCORE = StepKind("score", "score")
PROBE_SCORE = StepKind("probe score", "score")
TRAIN = StepKind("train", "train")
EVALUATE = StepKind("evaluate", "evaluate")  # answers to held-out problems
TEACHER_TEXT = StepKind(
    "teacher's text", "evaluate", "teacher"
)  # the teacher's, once for all policies
HIDDEN = StepKind("teacher's side", "evaluate")  # its hidden states on either
DISTANCE = StepKind("distance", "evaluate")  # of a policy to the teacher, token by token


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One artifact of a round, whether it exists or not.

    Example:
        >>> [step.kind.name for step in round_.steps]
        ['generate', 'score', 'train']
    """

    kind: StepKind
    round_index: int  # the round that makes it
    artifact: Artifact | PolicyArtifact
    model: Checkpoint | None  # samples, scores or is trained; None: it is only read
    needs: tuple["Step", ...] = ()  # complete before it can be; scores stream behind their rollouts
    is_new: bool = True  # made by its round, not kept from an earlier one or replayed
    teacher: str | None = None  # name of who scores, of several

    @property
    def shards(self) -> Artifact:
        """The artifact of a step that is made of shards."""
        assert isinstance(self.artifact, Artifact)
        return self.artifact

    @property
    def policy(self) -> PolicyArtifact:
        """The artifact of a step that trains."""
        assert isinstance(self.artifact, PolicyArtifact)
        return self.artifact

    @property
    def rollouts(self) -> "Step":
        """What a step of scores scores, and what hidden states and distances are of."""
        return self.needs[0]

    def is_void(self) -> bool:
        """Whether there is nothing to make: a probe of rollouts none of which the window cut."""
        if self.kind == PROBE_SCORE:
            return self.rollouts.is_void()
        if self.kind != PROBE or not self.needs[0].is_complete():
            return False
        return not counts_of(self.needs).get("length_rows")

    def is_complete(self) -> bool:
        """Whether nothing of it is left to make."""
        return self.artifact.is_complete() or self.is_void()

    def commits(self) -> list[Commit]:
        """The commit records of its units; none where nobody started it."""
        return list(self.shards.listed_commits().values()) if self.shards.is_started() else []


def with_needs(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, each after all that it needs, nothing twice."""
    seen: set[str] = set()
    for step in steps:
        for needed in (*with_needs(step.needs), step):
            if needed.artifact.name not in seen:
                seen.add(needed.artifact.name)
                yield needed


def of_stage(steps: Iterable[Step], *stages: Stage) -> list[Step]:
    """The steps that some stages make."""
    return [step for step in steps if step.kind.stage in stages]


def counts_of(steps: Iterable[Step]) -> dict[str, float]:
    """The counts of all units of some steps together."""
    return summed_counts(commit for step in steps for commit in step.commits())


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A unit of a cache, and the prompts of the round whose place it takes."""

    unit: int
    first: int
    last: int  # exclusive


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUnits:
    """Units of one scores artifact that a round trains on."""

    rollouts: str  # fingerprint
    scores: str  # fingerprint
    policy_version: int  # of the oldest tokens in it
    made_in: int  # the round that made the artifact
    slots: tuple[Slot, ...]
    weight: float = 1.0  # of its terms in the loss


class Progress(Protocol):
    """Bars, lines or nothing."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage begins, with `total` things to do, some of which may be done already."""
        ...

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        """`count` more things are done, with that many tokens; facts are its newest numbers."""
        ...

    def say(self, line: str) -> None:
        """Something worth a line of its own."""
        ...

    def warn(self, line: str) -> None:
        """Something that may be wrong."""
        ...


class Silent:
    """No output (library use and tests)."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass
