"""What a check says: one finding for each thing it looked at."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Example:
        >>> Finding(check="prompts", level="error", found="train.jsonl holds no prompts",
        ...         why="nothing can be sampled", todo="check the file")
    """

    check: str
    level: Level
    found: str
    why: str  # it matters
    todo: str  # empty where all is well


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A family of findings that matter for one reason.

    Example:
        >>> Check(name="disk", why="a full disk stops the run").ok("12 GB free")
    """

    name: str
    why: str

    def ok(self, found: str) -> Finding:
        """All is well."""
        return Finding(check=self.name, level="ok", found=found, why=self.why, todo="")

    def warning(self, found: str, todo: str) -> Finding:
        """The run may start, and may not do what is meant."""
        return Finding(check=self.name, level="warning", found=found, why=self.why, todo=todo)

    def error(self, found: str, todo: str) -> Finding:
        """The run should not start."""
        return Finding(check=self.name, level="error", found=found, why=self.why, todo=todo)

    def refused(self, error: Exception) -> Finding:
        """What a run would refuse; its line ends with what to do."""
        line = " ".join(str(error).split())
        found, semicolon, todo = line.rpartition("; ")
        return self.error(found, todo) if semicolon else self.error(line, "mend it, then ask again")


class Watcher(Protocol):
    """Is told of an examination while it goes on."""

    def begin(self, check: Check) -> None:
        """A check begins; it may have none, one or several findings."""
        ...

    def found(self, finding: Finding) -> None:
        """One more thing is known."""
        ...


class Unwatched:
    """Nobody looks before the examination is over."""

    def begin(self, check: Check) -> None:
        """A check begins."""

    def found(self, finding: Finding) -> None:
        """One more thing is known."""


@dataclass(slots=True, kw_only=True)
class Report:
    """All findings, and what could not be looked at."""

    watcher: Watcher = field(default_factory=Unwatched, repr=False)
    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)  # check -> reason

    def add(self, *findings: Finding) -> None:
        """Keep findings, and tell of each."""
        for finding in findings:
            self.findings.append(finding)
            self.watcher.found(finding)

    @property
    def may_start(self) -> bool:
        """Whether nothing was found that should keep the run from starting."""
        return not self.count("error")

    def count(self, level: Level) -> int:
        """Findings of a level."""
        return sum(finding.level == level for finding in self.findings)
