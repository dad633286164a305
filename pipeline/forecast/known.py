"""What a forecast knows: shapes of the models, and what the rounds measured so far."""

from dataclasses import dataclass

from opd_stream.config import Config
from opd_stream.costs import ModelShape, shape_of
from opd_stream.errors import UserError
from opd_stream.store.files import read_json
from pipeline.forecast.lengths import Measured
from pipeline.forecast.opened import Opened
from pipeline.forecast.sizes import ShardSizes, rollouts_sizes, scores_sizes
from pipeline.setup import Setup
from stages.checkpoints import Checkpoint


@dataclass(slots=True, kw_only=True)
class Known:
    """Changes from round to round, as more is measured."""

    opened: Opened
    student: ModelShape
    teacher: ModelShape | None
    rollouts_sizes: ShardSizes
    scores_sizes: ShardSizes
    evaluation_sizes: ShardSizes
    measured: Measured | None = None  # completions of the latest measured round
    evaluated: Measured | None = None  # of the latest measured evaluation

    @property
    def setup(self) -> Setup:
        """Of the run."""
        return self.opened.setup

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.opened.setup.config


def known_of(opened: Opened) -> Known:
    """Before the first round.

    Raises:
        UserError: the cost of a model does not follow from its config.
    """
    setup = opened.setup
    student = shape_at(setup.student)
    teacher = None if setup.teacher is None else shape_at(setup.teacher)
    return Known(
        opened=opened,
        student=student,
        teacher=teacher,
        rollouts_sizes=rollouts_sizes(setup.config.rollouts.extra_draws),
        evaluation_sizes=rollouts_sizes(0),
        scores_sizes=scores_sizes(
            setup.config,
            forced=len(setup.forced_ids),
            vocabulary=(teacher or student).vocabulary,
        ),
    )


def shape_at(model: Checkpoint) -> ModelShape:
    """The shape of a checkpoint.

    Raises:
        UserError: its config has not the fields of the Llama family.
    """
    try:
        return shape_of(read_json(model.folder / "config.json"))
    except KeyError as error:
        raise UserError(
            f"{model.folder}/config.json has no {error.args[0]!r}, from which its cost follows; "
            "expected a decoder with the fields of the Llama family; use such a model"
        ) from error
