"""What each artifact is made of: every setting that changes its content, and nothing else.

All recipes stand here so that one page answers "what makes a cache entry mine". Devices, workers,
batch sizes of engines, unit sizes and paths are missing on purpose.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from opd_stream.config import Config, Evaluation, Model, counts_rounds
from opd_stream.config.sections import Teacher
from opd_stream.engines import engine_recipe
from opd_stream.filters import Keep
from opd_stream.sources import Prompts
from opd_stream.store.codecs import ExactCodec, HiddenCodec
from opd_stream.store.recipe import Recipe
from opd_stream.tasks.distance import EDGES
from opd_stream.tasks.judges import judge_recipe
from opd_stream.windows import AdaptiveWindow
from stages.checkpoints import Checkpoint, Vocabulary
from stages.filtering import keep_recipe
from stages.prompts import chosen_selection, every_prompt, held_out_prompts, round_prompts
from stages.trajectories import trajectories_recipe

if TYPE_CHECKING:
    from stages.cross_tokenizer import AlignmentRecipe


BASIS_TOKENS = 2048  # states that a basis is fitted on, of wide teachers more; fewer of few prompts


def rollouts_recipe(
    config: Config,
    *,
    prompts: str,
    student: Checkpoint,
    vocabulary: Vocabulary,
    round_index: int,
    window_tokens: int,
    ranges: Sequence[tuple[int, int]] | None = None,
    chosen: Sequence[int] | None = None,
) -> Recipe:
    """Rollouts of one round, on all of its prompts or on some ranges of them.

    `prompts` is the fingerprint of the prompts artifact; `chosen` are the numbers of those that a
    curriculum chose.
    """
    rollouts = config.rollouts
    drawn = round_prompts(
        seed=config.seed,
        round_index=round_index,
        per_round=rollouts.prompts_per_round,
        ranges=ranges,
        given=_part(config, "own"),
    )
    return _sampling(
        config,
        prompts=prompts,
        student=student,
        vocabulary=vocabulary,
        selection=drawn if chosen is None else chosen_selection(chosen),
        window_tokens=window_tokens,
        samples_per_prompt=rollouts.samples_per_prompt,
        extra_draws=rollouts.extra_draws,
        **({"student_top_k": rollouts.student_top_k} if rollouts.student_top_k else {}),
        **({"prefix_tokens": rollouts.prefix_tokens} if rollouts.prefix_tokens else {}),
        temperature=rollouts.temperature,
        seed=config.seed * 1_000_003 + round_index,  # another pass over the prompts draws others
        **_environment(config, config.prompts),
    )


def _environment(config: Config, source: Prompts) -> dict[str, Any]:
    """What answers the student's turns behind the prompts of a source, where anything does."""
    environment = config.rollouts.environment
    if environment is None:
        return {}
    return {"environment": trajectories_recipe(environment, source.template)}


def _part(config: Config, part: Literal["own", "given"]) -> dict[str, Any] | None:
    """Which prompts of a round are meant, where some have given completions; None: all of them."""
    rollouts = config.rollouts
    if not rollouts.given_prompts:
        return None
    return {"rows": rollouts.given_prompts, "by": rollouts.given_by, "part": part}


def given_recipe(
    config: Config,
    *,
    prompts: str,
    student: Checkpoint,
    teacher: Checkpoint,
    vocabulary: Vocabulary,
    round_index: int,
    window_tokens: int,
) -> Recipe:
    """Rollouts of a round that the student does not write: of the prompts' rows, or the teacher's.

    `prompts` is the fingerprint of the prompts artifact. A completion of raw text ends with the
    lowest of the student's own terminators.
    """
    rollouts = config.rollouts
    settings: dict[str, Any] = {
        "origin": "given",
        "selection": round_prompts(
            seed=config.seed,
            round_index=round_index,
            per_round=rollouts.prompts_per_round,
            given=_part(config, "given"),
        ),
        "window_tokens": window_tokens,
        "samples_per_prompt": rollouts.given_samples,
        "seed": config.seed * 1_000_003 + round_index,
        **vocabulary.recipe,
    }
    if rollouts.given_by == "rows":
        own = [token for token in student.terminators() if token in vocabulary.stop_ids]
        settings["terminator"] = min(own or vocabulary.stop_ids)
        return Recipe(kind="rollouts", settings=settings, inputs={"prompts": prompts})
    assert config.teacher is not None
    settings |= {"extra_draws": 0, "temperature": rollouts.temperature}
    settings |= {**engine_recipe(config.teacher.engine), "dtype": config.teacher.dtype}
    settings |= _environment(config, config.prompts)
    inputs = {"prompts": prompts, "student": teacher.identity.fingerprint}
    return Recipe(kind="rollouts", settings=settings, inputs=inputs)


def is_given(rollouts: Recipe) -> bool:
    """Whether the student did not write them."""
    return rollouts.settings.get("origin") == "given"


def unscored_recipe(*, rollouts: str, keep: Keep | None) -> Recipe:
    """Stands for scores of given rollouts whose objective reads none: no teacher is asked.

    They are those of a teacher that is sure of the completion.
    """
    settings = {
        "unscored": True,
        "top_k": 1,
        "forced_ids": list[int](),
        "codec": ExactCodec().model_dump(mode="json"),
        "seed": 0,
        **({} if keep is None else {"keep": keep_recipe(keep)}),
    }
    return Recipe(kind="scores", settings=settings, inputs={"rollouts": rollouts})


def is_unscored(scores: Recipe) -> bool:
    """Whether they hold nothing of a teacher."""
    return "unscored" in scores.settings


def extension_recipe(
    base: Recipe, *, units: Sequence[int], student: Checkpoint, window_tokens: int
) -> Recipe:
    """Units of a rollouts artifact, their unfinished rows continued by the current student."""
    return Recipe(
        kind="rollouts",
        settings={**base.settings, "window_tokens": window_tokens, "extends": list(units)},
        inputs={
            **base.inputs,
            "student": student.identity.fingerprint,
            "rollouts": base.fingerprint,
        },
    )


def probe_recipe(window: AdaptiveWindow, rollouts: Recipe) -> Recipe:
    """Probes of a rollouts artifact: some of its unfinished rows, continued to full length."""
    return Recipe(
        kind="rollouts",
        settings={
            **rollouts.settings,
            "window_tokens": window.max_window_tokens,
            "extra_draws": 0,
            "probe": {"rows": window.probe_rows, "share": window.probe_share},
        },
        inputs={**rollouts.inputs, "rollouts": rollouts.fingerprint},
    )


def evaluation_rollouts_recipe(
    config: Config,
    evaluation: Evaluation,
    *,
    prompts: str,
    student: Checkpoint,
    vocabulary: Vocabulary,
) -> Recipe:
    """Rollouts on every held-out prompt, never shortened by a training window."""
    return _sampling(
        config,
        prompts=prompts,
        student=student,
        vocabulary=vocabulary,
        selection=_selection(config, evaluation),
        window_tokens=evaluation.max_new_tokens,
        samples_per_prompt=evaluation.samples_per_prompt,
        extra_draws=0,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
        **_filters(evaluation),
        **_environment(config, _source(evaluation)),
    )


def _source(evaluation: Evaluation) -> Prompts:
    assert evaluation.prompts is not None  # of one set of problems
    return evaluation.prompts


def _selection(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Of held-out prompts: all, or those of the training prompts that no round reads."""
    if evaluation.held_out is None:
        return every_prompt()
    return held_out_prompts(seed=config.seed, rows=evaluation.held_out)


def teacher_text_recipe(
    config: Config,
    evaluation: Evaluation,
    *,
    prompts: str,
    teacher: Checkpoint,
    vocabulary: Vocabulary,
) -> Recipe:
    """What the teacher writes to held-out prompts, for distances; the same for every student.

    `prompts` is the fingerprint of the prompts as the teacher reads them.
    """
    settings = config.teacher
    assert settings is not None  # checked before
    return Recipe(
        kind="rollouts",
        settings={
            "selection": _selection(config, evaluation),
            "window_tokens": evaluation.max_new_tokens,
            "samples_per_prompt": evaluation.samples_per_prompt,
            "extra_draws": 0,
            "temperature": 1.0,
            "seed": evaluation.seed,
            **vocabulary.recipe,
            **engine_recipe(settings.engine),
            "dtype": settings.dtype,
            **_environment(config, _source(evaluation)),
        },
        inputs={"prompts": prompts, "student": teacher.identity.fingerprint},
    )


def hidden_recipe(
    settings: Model, *, rollouts: str, teacher: Checkpoint, prompts: str | None
) -> Recipe:
    """The teacher's hidden states on rollouts, which its head makes distributions of.

    `prompts` is the fingerprint of the prompts as the teacher reads them, where the rollouts have
    others.
    """
    head = head_recipe(teacher, settings)
    return Recipe(
        kind="hidden",
        settings=head.settings,
        inputs={
            **head.inputs,
            "head": head.fingerprint,
            "rollouts": rollouts,
            **({} if prompts is None else {"prompts": prompts}),
        },
    )


def distance_recipe(
    settings: Model, *, hidden: Recipe, student: Checkpoint, prompts: str | None
) -> Recipe:
    """The distances of a policy to a teacher's hidden states, token by token.

    `prompts` is the fingerprint of the prompts as the student reads them, where the rollouts have
    others.
    """
    return Recipe(
        kind="distances",
        settings={**engine_recipe(settings.engine), "dtype": settings.dtype},
        inputs={
            "rollouts": hidden.inputs["rollouts"],
            "hidden": hidden.fingerprint,
            "student": student.identity.fingerprint,
            **({} if prompts is None else {"prompts": prompts}),
        },
    )


def distance_evaluation_recipe(texts: dict[str, str]) -> Recipe:
    """The figures of distances; `texts` has the fingerprint of those of each kind of text."""
    return Recipe(kind="evaluations", settings={"distance": list(EDGES)}, inputs=texts)


def scores_recipe(
    config: Config,
    *,
    rollouts: str,
    teacher: Checkpoint,
    forced_ids: tuple[int, ...],
    vocabulary: int | None,
    extends: str | None = None,
    alignment: "AlignmentRecipe | None" = None,
    prompts: str,
    teacher_prompts: str | None = None,
    keep: Keep | None = None,
) -> Recipe:
    """Teacher scores of a rollouts artifact; `rollouts` is its fingerprint.

    `vocabulary` is the first id that is no candidate, None where the teacher's head has none;
    `extends` is that of the scores of what an extension continues; `alignment` is what a teacher
    with another tokenizer adds, and its scores continue none: they are all made anew;
    `prompts` is the fingerprint of the prompts; `teacher_prompts` of those in the teacher's own
    rendering, if any; `keep` leaves rollouts out, and then scores continue none either: an
    extended row may be one that was left out.
    """
    scores, continued = config.scores, {} if extends is None or keep else {"scores": extends}
    assert config.teacher is not None  # the config asks for one wherever scores are made
    states = dict[str, str]()
    if isinstance(scores.codec, HiddenCodec):
        head = head_recipe(teacher, config.teacher)
        states["head"] = head.fingerprint
        if scores.codec.max_kl is not None:
            states["basis"] = basis_recipe(head, teacher_prompts or prompts).fingerprint
    return Recipe(
        kind="scores",
        settings={
            "top_k": scores.stored_candidates,
            "forced_ids": list(forced_ids),
            "codec": scores.codec.model_dump(mode="json"),
            "seed": config.seed if scores.codec.kind == "sampled" else 0,
            "temperature": 1.0,
            **engine_recipe(config.teacher.engine),
            "dtype": config.teacher.dtype,
            **_marked(config.teacher),
            **({} if vocabulary is None else {"vocabulary": vocabulary}),
            **({} if alignment is None else {"alignment": alignment.settings}),
            **({} if keep is None else {"keep": keep_recipe(keep)}),
        },
        inputs={
            "rollouts": rollouts,
            "teacher": teacher.identity.fingerprint,
            **(continued if alignment is None else alignment.inputs),
            **({} if teacher_prompts is None else {"prompts": teacher_prompts}),
            **states,
        },
    )


def _marked(teacher: Teacher) -> dict[str, str]:
    """Of a served teacher: that forced ids may be marked as lying in the tail."""
    is_marked = teacher.server is not None and teacher.server.forced == "tail"
    return {"forced": "tail"} if is_marked else {}


def head_recipe(teacher: Checkpoint, settings: Model) -> Recipe:
    """A teacher's output head, which makes distributions of its stored hidden states."""
    return Recipe(
        kind="heads",
        settings={**engine_recipe(settings.engine), "dtype": settings.dtype},
        inputs={"teacher": teacher.identity.fingerprint},
    )


def head_beside(made: Recipe) -> Recipe:
    """The recipe of the head of the teacher that made hidden states, from theirs."""
    engine = {
        name: value
        for name, value in made.settings.items()
        if name == "dtype" or name.startswith("engine")
    }
    return Recipe(kind="heads", settings=engine, inputs={"teacher": made.inputs["teacher"]})


def basis_recipe(head: Recipe, prompts: str) -> Recipe:
    """The basis in which hidden states of a teacher are rounded, fitted on its states on prompts.

    `prompts` is the fingerprint of the prompts as the teacher reads them.
    """
    return Recipe(
        kind="bases",
        settings={**head.settings, "tokens": BASIS_TOKENS},
        inputs={**head.inputs, "head": head.fingerprint, "prompts": prompts},
    )


_TRAIN_FIELDS = {
    *("top_k", "precision", "learning_rate", "schedule", "warmup", "weight_decay", "clip_norm"),
    *("rows_per_step", "gate", "freshness", "extrapolation", "lora", "guards", "betas"),
    *("optimizer", "select", "segment", "reference"),
}


def policy_recipe(
    config: Config,
    *,
    prompts: str,
    vocabulary: Vocabulary,
    base: Checkpoint,
    previous: str | None,
    caches: Sequence[tuple[str, int, Sequence[int] | None]],
    round_index: int,
    first_step: int,
    window_tokens: int | None = None,
    published: str = "float32",
    weights: Sequence[float] = (),
) -> Recipe:
    """The policy that a train stage makes.

    Args:
        config: the run.
        prompts: fingerprint of the training prompts; an extrapolation samples answers to some.
        vocabulary: of these answers.
        base: the student at the start of the round.
        previous: fingerprint of the policy artifact whose optimizer state continues, if any.
        caches: scores that are trained on: fingerprint, policy_version, and units (None: all).
        round_index: the round, from 0.
        first_step: optimizer steps done before the round.
        window_tokens: that an audit decided, where it is not that of the newest rollouts.
        published: dtype of the published weights.
        weights: of the terms of each of the caches in the loss; none: 1.
    """
    train, reward = config.train, _reward(config, vocabulary)
    given = train.given_objective
    inputs = {"base": base.identity.fingerprint}
    if reward:
        inputs["prompts"] = prompts
    if previous is not None:
        inputs["optimizer"] = previous
    for number, (scores, version, _) in enumerate(caches):
        inputs[f"scores.{number}.version_{version}"] = scores
    return Recipe(
        kind="policies",
        settings={
            "objectives": [part.recipe() for part in train.objective],
            **({} if given is None else {"given_objectives": [part.recipe() for part in given]}),
            **train.model_dump(mode="json", include=_TRAIN_FIELDS),
            **reward,
            **({} if published == "float32" else {"published": published}),
            **({} if train.dropout == "none" else {"dropout": train.dropout}),
            **({"warmup_steps": train.rising_steps} if train.rising_steps else {}),
            "progress": [round_index, config.rounds if counts_rounds(config) else None],
            "staleness": config.staleness.model_dump(mode="json"),
            "window": config.rollouts.window.recipe(),
            **({} if window_tokens is None else {"window_tokens": window_tokens}),
            "units": [None if units is None else list(units) for _, _, units in caches],
            **_measured(config),
            **({"weights": list(weights)} if any(weight != 1 for weight in weights) else {}),
            "first_step": first_step,
            "seed": config.seed,
        },
        inputs=inputs,
    )


def _measured(config: Config) -> dict[str, Any]:
    """What the pass rates of levels that a policy records follow from, if it records some."""
    select = config.rollouts.select
    return {} if select is None else {"levels": judge_recipe(select.judge)}


def _reward(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """What decides the answers that an extrapolation reads, if it reads some."""
    extrapolation = config.train.extrapolation
    if extrapolation is None or not extrapolation.prompts:
        return {}
    if extrapolation.signal == "kl":
        return {"lengths": vocabulary.recipe}
    assert config.evaluation is not None  # the config asks for one
    evaluation = config.evaluation.judged()
    assert evaluation is not None
    assert evaluation.judge is not None
    return {
        "reward": {
            "judge": judge_recipe(evaluation.judge),
            "max_new_tokens": evaluation.max_new_tokens,
            "temperature": evaluation.temperature,
            "seed": evaluation.seed,
            **_filters(evaluation),
            **vocabulary.recipe,
        }
    }


def _filters(evaluation: Evaluation) -> dict[str, float]:
    """What leaves tokens out of the draws of answers, where anything does."""
    asked = {"top_p": (evaluation.top_p, 1.0), "top_k": (evaluation.top_k, 0)}
    asked |= {"min_p": (evaluation.min_p, 0.0)}
    return {name: value for name, (value, nothing) in asked.items() if value != nothing}


def evaluation_recipe(evaluation: Evaluation, rollouts: Recipe) -> Recipe:
    """Verdicts on rollouts: on all samples, or on the first ones where fewer are asked for."""
    assert evaluation.judge is not None
    samples = evaluation.samples_per_prompt
    fewer = samples < rollouts.settings["samples_per_prompt"]
    return Recipe(
        kind="evaluations",
        settings={
            "judge": judge_recipe(evaluation.judge),
            **({"samples_per_prompt": samples} if fewer else {}),
        },
        inputs={"rollouts": rollouts.fingerprint},
    )


def _sampling(
    config: Config, *, prompts: str, student: Checkpoint, vocabulary: Vocabulary, **settings: Any
) -> Recipe:
    engine = {**engine_recipe(config.student.engine), "dtype": config.student.dtype}
    return Recipe(
        kind="rollouts",
        settings={**settings, **vocabulary.recipe, **engine},
        inputs={"prompts": prompts, "student": student.identity.fingerprint},
    )
