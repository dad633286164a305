"""The cost of each step of each round: counted where it is done, estimated where it is left.

Rounds are taken in order. What one of them measured, the lengths of completions and the sizes of
shards, is what the estimate of the later ones follows from.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from opd_stream.costs import (
    ModelShape,
    TokenCounts,
    forward_flops,
    train_flops,
    unknown_costs,
)
from opd_stream.extrapolation import held_out_rows
from opd_stream.store.artifact import Artifact, Commit, summed_counts
from opd_stream.store.files import is_remote
from opd_stream.store.policy import PolicyArtifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.windows import FixedWindow
from pipeline.caches import Cache
from pipeline.estimate.prompts import TeacherPrompts
from pipeline.estimate.reading import Problems, RunInputs
from pipeline.estimate.result import Amount, Basis, RoundCost, StepCost
from pipeline.estimate.sizes import (
    Completions,
    PromptLengths,
    ShardSizes,
    behind_other_prompts,
    completions_of,
    distance_sizes,
    expected_counts,
    hidden_sizes,
    measured_sizes,
    rollouts_sizes,
    scores_sizes,
)
from pipeline.evaluation import distance_steps
from pipeline.plan import is_due
from pipeline.rounds import Round, named_checkpoint, rounds
from stages.checkpoints import Checkpoint, model_shape, student_shape
from stages.evaluate import evaluation_rollouts
from stages.prompts import every_prompt, probe_size
from stages.recipes import is_given, is_unscored
from stages.step import (
    DISTANCE,
    EVALUATE,
    EXTEND,
    GENERATE,
    GIVEN,
    HIDDEN,
    PROBE,
    TEACHER_TEXT,
    TRAIN,
    Step,
    StepKind,
)

SAMPLING = ("temperature", "stop_ids", "extra_draws")  # what decides how completions end
NOTHING = TokenCounts(tokens=0, completion_tokens=0, pairs=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRows:
    """The rows of one unit of rollouts."""

    rows: float
    counts: TokenCounts  # that a model reads; measured where the rollouts are committed
    stored: TokenCounts  # that a shard holds: of an extension, whole rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """Rows that a round trains on, from one cache."""

    rollouts: str  # name of the artifact, which several teachers may score
    rows: float
    prompts: int
    window_tokens: int  # they were or will be sampled with
    lengths: PromptLengths
    completions: Completions | None  # None: each is taken to fill its window


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReads:
    """What training reads in a round, done or expected; a live teacher would read as much."""

    counts: TokenCounts
    optimizer_steps: int


class RunCosts:
    """The costs of a run's steps; remembers what the rounds so far have measured."""

    def __init__(self, inputs: RunInputs) -> None:
        setup = inputs.setup
        self.inputs, self.setup, self.config = inputs, setup, setup.config
        self.student = student_shape(setup.student, setup.config.train.lora)
        self.teachers = {
            each.name: model_shape(each.teacher)
            for each in setup.by_teacher
            if each.teacher is not None
        }
        known = [unknown_costs(student=self.student, teacher=t) for t in self.teachers.values()]
        known = known or [unknown_costs(student=self.student, teacher=None)]
        self.unknown = tuple(dict.fromkeys(line for lines in known for line in lines))
        self.reads: list[TokenCounts] = []  # of training, by round
        read = (setup.by_teacher[0].teacher or setup.student).config
        self._completions: Completions | None = None
        self._answers: Completions | None = None
        self._rollouts_sizes = rollouts_sizes(
            self.config.rollouts.extra_draws,
            student_top_k=self.config.rollouts.student_top_k,
            vocabulary=read.vocabulary,
        )
        self._answers_sizes = rollouts_sizes()
        self._scores_sizes = scores_sizes(
            self.config,
            forced=len(setup.forced_ids),
            vocabulary=read.vocabulary,
            width=read.settings.get("hidden_size", 0),
        )
        self._units: dict[str, dict[int, UnitRows]] = {}  # name of rollouts -> unit -> its rows
        self._texts: dict[str, dict[int, UnitRows]] = {}  # name of prompts -> the teacher's text

    def rounds(self) -> Iterator[RoundCost]:
        """Each round; number -1 is the evaluation of the initial student."""
        if self.config.evaluation is not None:
            yield RoundCost(
                index=-1,
                window_tokens=self.config.evaluation.max_new_tokens,
                steps=tuple(self._evaluations(self.setup.student, is_first=True)),
            )
        for each in rounds(self.setup, opened=named_checkpoint, expected=True):
            if each.index == 0 and self.config.replay is None:
                self._look_at_other_runs(each.caches[-1])
            yield self._round(each)

    def _round(self, each: Round) -> RoundCost:
        steps = [cost for step in each.new_steps if (cost := self._shards(step)) is not None]
        rows = [self._trained_rows(each, cache) for cache in each.caches]
        is_trained = each.policy.is_complete()
        reads = _was_read(each.policy) if is_trained else self._will_be_read(each, rows)
        self.reads.append(reads.counts)
        steps.append(self._training(rows, reads, is_trained=is_trained))
        if is_due(self.config, each.index):
            steps += self._evaluations(named_checkpoint(each.policy) if is_trained else None)
        return RoundCost(
            index=each.index,
            window_tokens=rows[-1].window_tokens,
            first_step=each.plan.first_step,
            optimizer_steps=reads.optimizer_steps,
            steps=tuple(steps),
        )

    def _shards(self, step: Step) -> StepCost | None:
        """The cost of rollouts or scores; None: there is nothing to make."""
        is_scored = step.kind.stage == "score"
        source = step.rollouts if is_scored else step
        units, commits = self._units_of(source), _commits(step.shards)
        if not commits and not any(unit.rows for unit in units.values()):
            return None
        if step.kind == GIVEN or is_unscored(step.shards.recipe):
            return None  # nothing is sampled, or scored
        shape, sizes = self.student, self._rollouts_sizes
        if step.kind.author == "teacher":
            shape = self.teachers[step.teacher]
        if is_scored:
            others = self.inputs.teacher_prompts.get(step.teacher)
            if source.kind == GENERATE and (others is None or others.share == 1):
                self._scores_sizes = measured_sizes(commits.values()) or self._scores_sizes
            shape, sizes = self.teachers[step.teacher], self._scores_sizes
            if others is not None:
                units = {n: self._as_read(source, unit, others) for n, unit in units.items()}
        settings = source.shards.recipe.settings
        cost = _step_cost(
            step.kind,
            units,
            commits,
            shape,
            sizes,
            window=settings["window_tokens"],
            samples=1 if source.kind == PROBE else settings["samples_per_prompt"],
            is_estimated=source.kind != PROBE and self._completions is not None,
        )
        return cost.model_copy(update={"teacher": step.teacher})

    def _as_read(self, rollouts: Step, unit: UnitRows, others: TeacherPrompts) -> UnitRows:
        """Rows of a unit that a teacher reads, behind the prompts that it reads."""
        selection = rollouts.shards.recipe.settings["selection"]
        if others.share != 1:
            counts, stored = (each * others.share for each in (unit.counts, unit.stored))
            unit = UnitRows(rows=unit.rows * others.share, counts=counts, stored=stored)
        if not unit.stored.tokens:
            return unit
        # Of an extension only the rows that grew are read.
        rows = unit.rows * min(1.0, unit.counts.tokens / unit.stored.tokens)
        pair = (self.inputs.prompts.selected(selection), others.selected(selection))
        return replace(unit, counts=behind_other_prompts(unit.counts, rows, *pair))

    def _units_of(self, step: Step) -> dict[int, UnitRows]:
        """The units of rollouts, each with the rows that it has or will have."""
        name = step.artifact.name
        if name not in self._units:
            kinds = {EXTEND: self._extended, PROBE: self._probed}
            self._units[name] = kinds.get(step.kind, self._fresh)(step)
        return self._units[name]

    def _fresh(self, step: Step) -> dict[int, UnitRows]:
        rollouts, settings = step.shards, step.shards.recipe.settings
        window, commits = settings["window_tokens"], _commits(rollouts)
        measured = completions_of(window, summed_counts(commits.values()))
        completions = measured or self._completions
        if not is_given(rollouts.recipe):
            self._completions = completions
            self._rollouts_sizes = measured_sizes(commits.values()) or self._rollouts_sizes
        selection = settings["selection"]
        ranges = selection.get("ranges", [(0, self._prompts(step))])
        # With ranges, a unit has the place of the one it stands for.
        longest = max(last - first for first, last in ranges)
        return _sampled_units(
            rollouts,
            commits,
            window=window,
            prompts=sum(last - first for first, last in ranges),
            prompts_per_unit=longest if "ranges" in selection else self.config.prompts_per_unit,
            samples=settings["samples_per_prompt"],
            lengths=self.inputs.prompts.selected(selection),
            completions=completions,
        )

    def _prompts(self, rollouts: Step) -> int:
        """Prompts of a round that an artifact of rollouts is on."""
        settings = self.config.rollouts
        given = is_given(rollouts.shards.recipe)
        return settings.given_prompts if given else settings.own_prompts

    def _extended(self, step: Step) -> dict[int, UnitRows]:
        """Rows continued to a longer window: new tokens are computed, whole rows are stored."""
        settings, base = step.shards.recipe.settings, step.needs[0].shards
        window, before, commits = settings["window_tokens"], _commits(base), _commits(step.shards)
        lengths = self.inputs.prompts.selected(settings["selection"])
        units: dict[int, UnitRows] = {}
        for unit, old in enumerate(settings["extends"]):
            rows, cut = (before[old].counts[name] for name in ("rows", "length_rows"))
            whole = expected_counts(cut, window, lengths, None)
            new = TokenCounts(
                tokens=whole.tokens,
                completion_tokens=cut * (window - base.recipe.settings["window_tokens"]),
                pairs=whole.pairs,
            )
            stored = expected_counts(rows, window, lengths, self._completions)
            counts = _counts([commits[unit]]) if unit in commits else new
            units[unit] = UnitRows(rows=rows, counts=counts, stored=stored)
        return units

    def _probed(self, step: Step) -> dict[int, UnitRows]:
        """One unit of unfinished rows, taken to fill the longest window."""
        settings, commits = step.shards.recipe.settings, _commits(step.shards)
        rows = sum(unit.rows for unit in self._units_of(step.needs[0]).values())
        cut = rows if self._completions is None else rows * self._completions.cut_share
        size = probe_size(round(rows), settings["probe"], -int(-cut // 1))
        lengths = self.inputs.prompts.selected(settings["selection"])
        counts = expected_counts(size, settings["window_tokens"], lengths, None)
        counts = _counts(commits.values()) if commits else counts
        return {0: UnitRows(rows=size, counts=counts, stored=counts)}

    def _look_at_other_runs(self, cache: Cache) -> None:
        """Take what other runs in the store measured, until this one has measured something."""
        rollouts = _similar_rollouts(self.setup.store, cache.rollouts.shards.recipe)
        if rollouts is not None:
            commits = _commits(rollouts).values()
            window = rollouts.recipe.settings["window_tokens"]
            self._completions = completions_of(window, summed_counts(commits))
            self._rollouts_sizes = measured_sizes(commits) or self._rollouts_sizes
        scores = _similar_scores(self.setup.store, cache.scores.shards.recipe)
        self._scores_sizes = measured_sizes(_commits(scores).values()) or self._scores_sizes

    def _trained_rows(self, each: Round, cache: Cache) -> TrainedRows:
        """What a round trains on from one of its caches."""
        settings = cache.rollouts.shards.recipe.settings
        window = cache.window_tokens or each.plan.window_tokens
        prompts = sum(slot.last - slot.first for slot in cache.slots)
        if cache.rollouts.is_new:
            rows = sum(unit.rows for unit in self._units_of(cache.rollouts).values())
            completions = self._completions
        else:
            counts = summed_counts(cache.used(cache.rollouts))
            is_whole = "extends" not in settings  # else only new tokens are counted
            rows = counts["rows"]
            completions = completions_of(window, counts) if is_whole else self._completions
        others = self.inputs.teacher_prompts.get(cache.scores.teacher)
        return TrainedRows(
            rollouts=cache.rollouts.artifact.name,
            rows=rows if others is None else rows * others.share,
            prompts=prompts or self._prompts(cache.rollouts),
            window_tokens=window,
            lengths=self.inputs.prompts.selected(settings.get("selection") or every_prompt()),
            completions=completions,
        )

    def _will_be_read(self, each: Round, parts: Collection[TrainedRows]) -> TrainingReads:
        """Every epoch over every row, each optimizer step up to its own window."""
        rows_per_step, whole = self.config.train.rows_per_step, sum(part.rows for part in parts)
        rows = whole - held_out_rows(whole, self.config.train.extrapolation)
        per_epoch = -int(-rows // rows_per_step)
        steps = per_epoch * self.config.staleness.max_epochs
        window = self.config.rollouts.window
        if window.is_decided:
            window = FixedWindow(tokens=each.plan.window_tokens)
        shares: dict[int, float] = defaultdict(float)  # window -> of the rows of an epoch
        for step in range(steps):
            in_step = min(rows_per_step, rows - step % per_epoch * rows_per_step)
            shares[window.tokens_at(each.plan.first_step + step)] += in_step / whole
        total = NOTHING
        for tokens, share in shares.items():
            for part in parts:
                most = min(tokens, part.window_tokens)
                total += expected_counts(part.rows, most, part.lengths, part.completions) * share
        return TrainingReads(counts=total, optimizer_steps=steps)

    def train_flops(self, counts: TokenCounts) -> float:
        """Operations of training that reads these rows."""
        train = self.config.train
        return train_flops(
            self.student,
            counts,
            recomputed=train.gradient_checkpointing,
            selects=train.select is not None,
            has_reference=train.reference is not None,
        )

    def _training(
        self, parts: Collection[TrainedRows], reads: TrainingReads, *, is_trained: bool
    ) -> StepCost:
        amount = Amount(
            rows=sum(part.rows for part in parts),
            tokens=reads.counts.completion_tokens,
            flops=self.train_flops(reads.counts),
        )
        is_estimated = all(part.completions is not None for part in parts)
        prompts = {part.rollouts: part.prompts for part in parts}
        return StepCost(
            kind=TRAIN,
            window_tokens=max(part.window_tokens for part in parts),
            prompts=sum(prompts.values()),
            done=amount if is_trained else Amount(),
            left=Amount() if is_trained else amount,
            units_left=int(not is_trained),
            basis=_basis(is_trained, is_estimated),
        )

    def _evaluations(
        self, policy: Checkpoint | None, *, is_first: bool = False
    ) -> Iterator[StepCost]:
        """Sampling on held-out prompts, where it is known how many there are; distances from it."""
        for problems in self.inputs.problems:
            if problems.lengths.rows is None:
                continue
            answers = None if policy is None else self._answers_of(problems, policy)
            artifact = None if answers is None else answers.shards
            commits, window = _commits(artifact), problems.settings.max_new_tokens
            measured = completions_of(window, summed_counts(commits.values()))
            self._answers = measured or self._answers
            self._answers_sizes = measured_sizes(commits.values()) or self._answers_sizes
            units = self._held_out(problems, artifact, self._answers)
            yield self._read_held_out(
                EVALUATE, problems, units, commits, self.student, self._answers_sizes
            )
            if problems.settings.kind == "distance":
                yield from self._distances(problems, units, answers, is_first=is_first)

    def _answers_of(self, problems: Problems, policy: Checkpoint) -> Step:
        setup = self.setup
        artifact = evaluation_rollouts(
            setup.store,
            self.config,
            problems.settings,
            prompts=problems.artifact,
            student=policy,
            vocabulary=setup.vocabulary,
        )
        return Step(kind=EVALUATE, round_index=-1, artifact=artifact, model=policy)

    def _distances(
        self,
        problems: Problems,
        units: Mapping[int, UnitRows],
        answers: Step | None,
        *,
        is_first: bool,
    ) -> Iterator[StepCost]:
        """The teacher's side of a policy's samples, and the policy's of these and of its text.

        The first of the evaluations also pays for the teacher's text and its own side of it.
        """
        setup, config, teacher = self.setup, self.config, self.inputs.compared
        assert teacher is not None
        assert config.teacher is not None
        shape = model_shape(teacher)
        wide = hidden_sizes(
            teacher.config.settings.get("hidden_size", 0),
            is_narrow=config.teacher.dtype != "float32",
        )
        steps: dict[str, Step] = {}
        if answers is not None:
            asked = (config, setup.store, problems.settings, answers, setup.vocabulary)
            steps = distance_steps(*asked, teacher)
        texts = self._texts.setdefault(problems.artifact.name, dict(units))
        if is_first and steps:
            written = steps["teacher_text"].rollouts
            commits = _commits(written.shards)
            lengths = completions_of(
                problems.settings.max_new_tokens, summed_counts(commits.values())
            )
            texts = self._held_out(problems, written.shards, lengths)
            self._texts[problems.artifact.name] = texts
            sizes = measured_sizes(commits.values()) or rollouts_sizes(0)
            yield self._read_held_out(TEACHER_TEXT, problems, texts, commits, shape, sizes)
        for text, rows in (("samples", units), ("teacher_text", texts)):
            step = steps.get(text)
            if text == "samples" or is_first:
                commits = {} if step is None else _commits(step.needs[1].shards)
                yield self._read_held_out(HIDDEN, problems, rows, commits, shape, wide)
            commits = {} if step is None else _commits(step.shards)
            yield self._read_held_out(
                DISTANCE, problems, rows, commits, self.student, distance_sizes()
            )

    def _held_out(
        self, problems: Problems, artifact: Artifact | None, completions: Completions | None
    ) -> dict[int, UnitRows]:
        """The units of what is written to held-out prompts."""
        assert problems.lengths.rows is not None
        return _sampled_units(
            artifact,
            _commits(artifact),
            window=problems.settings.max_new_tokens,
            prompts=problems.lengths.rows,
            prompts_per_unit=self.config.prompts_per_unit,
            samples=problems.settings.samples_per_prompt,
            lengths=problems.lengths.selected(every_prompt()),
            completions=completions,
        )

    def _read_held_out(
        self,
        kind: StepKind,
        problems: Problems,
        units: Mapping[int, UnitRows],
        commits: Mapping[int, Commit],
        shape: ModelShape,
        sizes: ShardSizes,
    ) -> StepCost:
        return _step_cost(
            kind,
            units,
            commits,
            shape,
            sizes,
            window=problems.settings.max_new_tokens,
            samples=problems.settings.samples_per_prompt,
            is_estimated=self._answers is not None,
        )


@lru_cache(maxsize=4)  # a round asks for each of its artifacts twice
def _commits(artifact: Artifact | None) -> dict[int, Commit]:
    """Unit -> commit record; from the manifest, one file, where the artifact is complete."""
    return {} if artifact is None else artifact.listed_commits()


def _counts(commits: Iterable[Commit]) -> TokenCounts:
    """The tokens of commit records; 0 where they were not counted (imported rows)."""
    counts = summed_counts(commits)
    names = ("tokens", "completion_tokens", "pairs")
    return TokenCounts(**{name: counts.get(name, 0.0) for name in names})


def _sampled_units(
    rollouts: Artifact | None,
    commits: Mapping[int, Commit],
    *,
    window: int,
    prompts: int,
    prompts_per_unit: int,
    samples: int,
    lengths: PromptLengths,
    completions: Completions | None,
) -> dict[int, UnitRows]:
    """The units of rollouts, in the layout of a started artifact or in that of the config."""
    if rollouts is not None and rollouts.is_started():
        sizes = {unit: len(rollouts.unit_rows(unit)) for unit in rollouts.units()}
    else:
        starts = range(0, prompts, prompts_per_unit)
        sizes = {unit: min(prompts_per_unit, prompts - start) for unit, start in enumerate(starts)}
    found: dict[int, UnitRows] = {}
    for unit, size in sizes.items():
        if unit in commits:
            counts = _counts([commits[unit]])
        else:
            counts = expected_counts(size * samples, window, lengths, completions)
        found[unit] = UnitRows(rows=size * samples, counts=counts, stored=counts)
    return found


def _step_cost(
    kind: StepKind,
    units: Mapping[int, UnitRows],
    commits: Mapping[int, Commit],
    shape: ModelShape,
    sizes: ShardSizes,
    *,
    window: int,
    samples: int,
    is_estimated: bool,
) -> StepCost:
    """A forward pass over every row of the units: of those in `commits` it is done."""
    done, left = Amount(), Amount()
    for number, unit in units.items():
        commit = commits.get(number)
        if commit is None:
            left += Amount(
                rows=unit.rows,
                tokens=unit.counts.completion_tokens,
                bytes=sizes.bytes(unit.stored, unit.rows, 1),
                flops=forward_flops(shape, unit.counts),
            )
        else:
            counts = _counts([commit])
            done += Amount(
                rows=commit.counts.get("rows", unit.rows),
                tokens=counts.completion_tokens,
                bytes=commit.bytes,
                flops=forward_flops(shape, counts) if counts.pairs else 0.0,
            )
    units_left = len(units) - len(commits)
    return StepCost(
        kind=kind,
        window_tokens=window,
        prompts=round(sum(unit.rows for unit in units.values()) / samples),
        done=done,
        left=left,
        units=len(units),
        units_left=units_left,
        basis=_basis(not units_left, is_estimated),
    )


def _basis(is_done: bool, is_estimated: bool) -> Basis:
    return "measured" if is_done else "estimated" if is_estimated else "full window"


def _was_read(policy: PolicyArtifact) -> TrainingReads:
    outcome = policy.manifest().outcome
    read = outcome.trained
    counts = TokenCounts(
        tokens=read.row_tokens, completion_tokens=read.tokens, pairs=read.row_pairs
    )
    return TrainingReads(counts=counts, optimizer_steps=outcome.steps)


def _similar_rollouts(store: Store, recipe: Recipe) -> Artifact | None:
    """Rollouts of the same student on the same prompts, under the longest window there is."""
    recipes = [
        other
        for other in _local_recipes(store, recipe)
        if other.inputs == recipe.inputs
        and not {"probe", "extends"} & other.settings.keys()
        and all(other.settings.get(name) == recipe.settings.get(name) for name in SAMPLING)
    ]
    return _first_committed(store, sorted(recipes, key=lambda r: -r.settings["window_tokens"]))


def _similar_scores(store: Store, recipe: Recipe) -> Artifact | None:
    """Scores by the same teacher in the same columns, whatever they score."""
    recipes = (
        other
        for other in _local_recipes(store, recipe)
        if other.settings == recipe.settings
        and other.inputs.get("teacher") == recipe.inputs["teacher"]
        and "scores" not in other.inputs  # an extension counts only its new tokens
    )
    return _first_committed(store, recipes)


def _local_recipes(store: Store, recipe: Recipe) -> Iterable[Recipe]:
    """Of the store; those of an object store would cost a request each."""
    return [] if is_remote(store.root) else store.recipes(recipe.kind)


def _first_committed(store: Store, recipes: Iterable[Recipe]) -> Artifact | None:
    artifacts = (store.artifact(recipe) for recipe in recipes)
    return next((artifact for artifact in artifacts if _commits(artifact)), None)
