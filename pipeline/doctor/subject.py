"""What the checks look at: each thing is opened once, when first asked for.

The check that asks first tells why something is refused; later checks that need it are not made.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import pyarrow as pa

from opd_stream.config import Config, Evaluation, Pool
from opd_stream.config.sections import Model
from opd_stream.errors import named
from opd_stream.prompts import TokenisedPrompts, rendered_prompts, tokenised_prompts
from opd_stream.sources import Prompts, source_settings
from opd_stream.store.policy import UNREAD, identify
from opd_stream.store.store import Store
from pipeline.doctor.findings import NotChecked
from pipeline.setup import Setup, open_setup, open_store, teacher_rendering
from stages.checkpoints import Checkpoint, open_model, weight_shapes

T = TypeVar("T")


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

    def model(self, role: str) -> Checkpoint:
        """The checkpoint of a role."""
        if role not in self.engines:
            raise NotChecked(f"the config names no {role}")
        path = self.engines[role].folder

        def opened() -> Checkpoint:
            try:
                return open_model(self.store, self.engines[role])
            except NotChecked:  # the store cannot be written
                served = UNREAD if self.engines[role].engine == "server" else None
                identity = identify(path, weights_sha256=served)
                return Checkpoint(
                    folder=path.resolve(), identity=identity, is_served=served is not None
                )

        return self._once(f"the {role}", opened)

    @property
    def roles(self) -> list[str]:
        """Roles whose checkpoint a run opens; a replay's teacher need not be here."""
        is_run = self.config.replay is None
        return [r for r, m in self.engines.items() if r == "student" or is_run or m.is_here]

    @property
    def models(self) -> dict[str, Checkpoint]:
        """Role -> checkpoint, of those that can be opened."""
        return _opened(self.roles, self.model)

    def parameters(self, role: str) -> int:
        """Numbers in the weights of a role."""
        folder = self.model(role).folder
        if self.model(role).is_served:
            raise NotChecked(f"the {role}'s weights are a server's")
        return self._once(
            f"the {role}'s weights", lambda: sum(map(prod, weight_shapes(folder).values()))
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Role -> parameters, of those whose weights are whole."""
        return _opened(self.roles, self.parameters)

    @property
    def problems(self) -> dict[str, Evaluation]:
        """Field of the config -> a set of problems that policies are evaluated on."""
        evaluation = self.config.evaluation
        if evaluation is None or evaluation.benchmarks is None:
            return {} if evaluation is None else {"evaluation.prompts": evaluation}
        parts = evaluation.parts().items()
        return {f"evaluation.benchmarks.{name}.prompts": part for name, part in parts}

    @property
    def sources(self) -> dict[str, Prompts]:
        """Field of the config -> a source of prompts."""
        held_out = {name: part.prompts for name, part in self.problems.items() if part.prompts}
        return {"prompts": self.config.prompts, **held_out}

    def prompts(self, name: str) -> TokenisedPrompts:
        """The prompts of a source as the run will have them."""
        tokenizer = self.model("student").tokenizer()

        def read() -> TokenisedPrompts:
            with named(name):
                source_settings(self.sources[name])  # its files exist
                return tokenised_prompts(self.sources[name], tokenizer)

        return self._once(name, read)

    def table(self, name: str) -> pa.Table:
        """The table of `prompts`."""
        return self.prompts(name).table

    def teacher_table(self) -> pa.Table | None:
        """The training prompts in the teacher's own rendering; None: it reads the student's."""
        config = self.config
        rendering = teacher_rendering(config)
        if rendering is None or config.replay is not None:
            return None
        table = self.table("prompts")
        tokenizer = self.model("teacher").tokenizer()
        return self._once(
            rendering.field,
            lambda: rendered_prompts(config.prompts, rendering, tokenizer, table),
        )

    @property
    def tables(self) -> dict[str, pa.Table]:
        """Field of the config -> prompts, of the sources that can be read."""
        return _opened(self.sources, self.table)

    @property
    def setup(self) -> Setup:
        """What every command of a run opens first."""
        _ = self.store
        for role in self.roles:
            self.model(role)  # else the run would fetch it, and nothing is made here
        return self._once("what a run needs", lambda: open_setup(self.config, make=False))


def _opened(names: Iterable[str], open_: Callable[[str], T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name in names:
        with contextlib.suppress(NotChecked):
            found[name] = open_(name)
    return found
