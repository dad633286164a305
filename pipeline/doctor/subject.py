"""What a check is, and what the checks look at: each thing is opened once, when first asked for.

The check that asks first tells why something is refused; later checks that need it are not made.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from opd_stream.config import Config, Evaluation, Pool
from opd_stream.config.sections import Model
from opd_stream.prompts import Prompts, prompts_table, source_settings
from opd_stream.store.policy import identify
from opd_stream.store.store import Store
from pipeline.doctor.findings import Finding
from pipeline.setup import Setup, open_setup, open_store
from stages.checkpoints import Checkpoint, open_checkpoint, weight_shapes

T = TypeVar("T")


class NotChecked(Exception):
    """Something could not be looked at, and why."""


@dataclass(slots=True)
class Subject:
    """A config that is examined."""

    config: Config
    quick: bool  # load no model, ask no cluster
    _opened: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, open_: Callable[[], T]) -> T:
        if name not in self._opened:
            self._opened[name] = NotChecked(f"{name} cannot be opened")
            self._opened[name] = open_()
        found = self._opened[name]
        if isinstance(found, NotChecked):
            raise found
        return found

    @property
    def store(self) -> Store:
        """The run's store, which can be written."""
        return self._once("the store", lambda: open_store(self.config))

    @property
    def engines(self) -> dict[str, Model]:
        """Role -> settings of its model."""
        found: dict[str, Model] = {"student": self.config.student}
        return found if self.config.teacher is None else {**found, "teacher": self.config.teacher}

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools of the roles that have a model."""
        return {role: getattr(self.config.pools, role) for role in self.engines}

    @property
    def roles(self) -> list[str]:
        """Roles whose checkpoint a run opens; a replay's teacher need not be here."""
        is_run = self.config.replay is None
        return [r for r, m in self.engines.items() if r == "student" or is_run or m.path.is_dir()]

    def model(self, role: str) -> Checkpoint:
        """The checkpoint of a role."""
        if role not in self.engines:
            raise NotChecked(f"the config names no {role}")
        return self._once(f"the {role}", lambda: self._checkpoint(self.engines[role].path))

    def _checkpoint(self, path: Path) -> Checkpoint:
        try:
            return open_checkpoint(self.store, path)
        except NotChecked:  # the store cannot be written
            return Checkpoint(folder=path.resolve(), identity=identify(path))

    @property
    def models(self) -> dict[str, Checkpoint]:
        """Role -> checkpoint, of those that can be opened."""
        return self._those_opened(self.roles, self.model)

    def parameters(self, role: str) -> int:
        """Numbers in the weights of a role."""
        folder = self.model(role).folder
        return self._once(f"the {role}'s weights", lambda: parameters_of(folder))

    @property
    def sizes(self) -> dict[str, int]:
        """Role -> parameters, of those whose weights are whole."""
        return self._those_opened(self.roles, self.parameters)

    @property
    def problems(self) -> dict[str, Evaluation]:
        """Field of the config -> a set of problems that policies are evaluated on."""
        evaluation = self.config.evaluation
        if evaluation is None:
            return {}
        if evaluation.benchmarks is None:
            return {"evaluation.prompts": evaluation}
        parts = evaluation.parts().items()
        return {f"evaluation.benchmarks.{name}.prompts": part for name, part in parts}

    @property
    def sources(self) -> dict[str, Prompts]:
        """Field of the config -> a source of prompts."""
        held_out = {name: part.prompts for name, part in self.problems.items() if part.prompts}
        return {"prompts": self.config.prompts, **held_out}

    def table(self, name: str) -> pa.Table:
        """The prompts of a source as the run will have them."""
        tokenizer = self.model("student").tokenizer()
        return self._once(name, lambda: read_table(self.sources[name], tokenizer))

    @property
    def tables(self) -> dict[str, pa.Table]:
        """Field of the config -> prompts, of the sources that can be read."""
        return self._those_opened(self.sources, self.table)

    @property
    def setup(self) -> Setup:
        """What every command of a run opens first."""
        _ = self.store
        return self._once("what a run needs", lambda: open_setup(self.config, make=False))

    @staticmethod
    def _those_opened(names: Iterable[str], open_: Callable[[str], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for name in names:
            with contextlib.suppress(NotChecked):
                found[name] = open_(name)
        return found


def parameters_of(folder: Path) -> int:
    """Numbers in the weights of a checkpoint."""
    return sum(map(prod, weight_shapes(folder).values()))


def read_table(source: Prompts, tokenizer: Any) -> pa.Table:
    """The prompts of a source."""
    source_settings(source)  # its files are there
    return prompts_table(source, tokenizer)


Look = Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A function that looks at a subject, and why what it finds matters.

    Example:
        >>> list(disk.look(Subject(config, quick=True)))
        [disk.ok("12 GB free")]
    """

    name: str
    why: str
    look: Look
    loads_models: bool

    def ok(self, found: str) -> Finding:
        """All is well."""
        return Finding(check=self.name, level="ok", found=found, why=self.why)

    def warning(self, found: str, todo: str = "") -> Finding:
        """The run may start, and may not do what is meant."""
        return Finding(check=self.name, level="warning", found=found, why=self.why, todo=todo)

    def error(self, found: str, todo: str = "") -> Finding:
        """The run should not start."""
        return Finding(check=self.name, level="error", found=found, why=self.why, todo=todo)

    def refused(self, error: Exception) -> Finding:
        """What a run would refuse, in the run's own line, which says what to do."""
        return self.error(" ".join(str(error).split()))

    def or_ok(self, problems: Iterable[Finding], found: str) -> Iterator[Finding]:
        """The problems; where there are none, what is well."""
        problems = list(problems)
        yield from problems or [self.ok(found)]


def check(why: str, *, loads_models: bool = False) -> Callable[[Look], Check]:
    """Make a function a check that is called like it."""

    def decorate(look: Look) -> Check:
        name = look.__name__.replace("_", "-")
        return Check(name=name, why=why, look=look, loads_models=loads_models)

    return decorate
