"""Checks that load models: what a run would compute, computed again in another way.

The workers, codec, shards and reader are those of a run, on a few rollouts in a throwaway store.
Three laws are tried: a student that is its own teacher has nothing to learn; what an engine says of
the tokens it drew is what a plain forward pass at temperature 1 says; and scores in the store are
what the teacher says today. And it is measured how much there is to learn.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.config import Config
from opd_stream.config.sections import Model, Student, Teacher
from opd_stream.coverage import (
    ENOUGH,
    SUPPORTS,
    Support,
    SupportShare,
    least_supports,
    support_shares,
)
from opd_stream.drift import ratio_error
from opd_stream.engines import open_engine
from opd_stream.engines.base import ScoringSettings
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import (
    HIDDEN_MAX_ERROR,
    Codec,
    CompactCodec,
    ExactCodec,
    HiddenCodec,
    SampledCodec,
    codec_of,
)
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from pipeline.doctor.findings import Finding, NotChecked, check
from pipeline.doctor.subject import Subject
from pipeline.rounds import rounds
from pipeline.setup import Setup, largest_window
from stages.checkpoints import Checkpoint, open_served_checkpoint
from stages.generate import GenerateWorker
from stages.prompts import prompt_ids_of
from stages.recipes import rollouts_recipe, scores_recipe
from stages.score import ScoreWorker
from stages.workers import Task, TaskResult, Worker, WorkerSettings

COVERAGE_TOKENS = 256  # about so many, whose whole distributions both exist
ROWS, TOKENS = 8, 64  # of a trial
LOSS = 1e-4  # nats a token in float32; what the codec rounds is added
TOKEN = 1e-3  # nats, largest of a drawn token in float32; what the codec rounds is added
RECORDED = 1e-3  # nats, mean over tokens; what plain arithmetic in 16 bits is off is added
ALIKE = 2e-3  # nats a token, from where on student and teacher are two models
PLAIN = 1.5  # an engine in 16 bits may be off by so many times what plain arithmetic is
DEVIATIONS = 5.0  # of the mean surprise from its expectation
CONTROLS = 4.0  # a cached score may differ by so many times what two live ones differ by
FLOOR = 1e-4  # nats, where two live ones are alike
PROBABLE = -7.0  # candidates below this log-probability are left out: rounding of tails is no error
HALF_UNIT = 2.0**-11  # of float16, relative
Result = TypeVar("Result")
Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.integer[Any]]


class RowScores(NamedTuple):
    """Log-probabilities of one row, nats."""

    drawn_T: Floats
    candidates_TK: Floats


LiveScores = tuple[list[RowScores], list[RowScores]]  # each row alone, and all together


@check(
    "drift and importance weights compare training with the log-probabilities that the engine "
    "recorded; an error there looks like a student that has moved",
    loads_models=True,
)
def sampler(subject: Subject) -> Iterator[Finding]:
    """The student's engine: recorded log-probabilities, and the temperature it draws at."""
    config, setup = subject.config, subject.setup
    with tempfile.TemporaryDirectory() as folder:
        rollouts = _sampled(Path(folder), setup, config, _first_prompts(subject), setup.student)
        batch = rollouts_batch(rollouts.read_unit(0))
    temperature, dtype = config.rollouts.temperature, config.student.dtype
    gap_N, plain, deviations, power = _read_again(setup.student.folder, batch, temperature, dtype)
    limit = RECORDED + PLAIN * plain
    of_it = f", of which plain {dtype} arithmetic explains {plain:.1e}" if plain else ""
    said = (
        f"recorded log-probabilities differ from a forward pass at temperature 1 by "
        f"{gap_N.mean():.1e} nats in the mean, {gap_N.max():.1e} at most, over {len(gap_N)} tokens "
        f"(allowed {limit:.1e} in the mean, {dtype}{of_it})"
    )
    found: list[Finding] = []
    if not gap_N.mean() <= limit:
        todo = (
            "the engine records another distribution (after temperature, top-p or a penalty), "
            "or runs other weights: try student.engine=transformers, student.dtype=float32"
        )
        found.append(sampler.error(said, todo))
    tells = abs(power) > DEVIATIONS
    if tells and abs(deviations) > DEVIATIONS:
        one = sampler.error(
            f"drawn tokens are {'more' if deviations > 0 else 'less'} surprising than at "
            f"temperature {temperature:g}, by {abs(deviations):.1f} standard deviations over "
            f"{len(gap_N)} tokens (allowed {DEVIATIONS:g})",
            "the engine draws from another distribution than rollouts.temperature says; look "
            "for top-k, top-p, penalties or a generation_config.json that it applies",
        )
        found.append(one)
    if temperature not in (0.0, 1.0):
        one = sampler.warning(
            f"rollouts.temperature is {temperature:g}: tokens are drawn from another "
            "distribution than the one whose log-probabilities are recorded",
            "set rollouts.temperature=1; drift and distance are then of what was drawn",
        )
        found.append(one)
    yield from sampler.or_ok(
        found,
        f"{said}; surprise of the drawn tokens {deviations:+.1f} standard deviations (half the "
        f"temperature: {power:+.1f}{'' if tells else ', too little to tell'})",
    )


def _read_again(
    folder: Path, batch: RolloutBatch, temperature: float, dtype: str
) -> tuple[Floats, float, float, float]:
    """Each rollout is read once more, whole, in float32, and in the engine's own 16 bits.

    Returns:
        |recorded - computed| log-probability of each drawn token, nats [N]; the mean of the same of
        the plain model in the engine's dtype (0: float32); how far their surprise is from its
        expectation, in standard deviations; and where that would stand, were the tokens drawn at
        half the temperature.
    """
    import torch

    model = _model_of_training(folder)
    gaps: list[Floats] = []
    exact: list[torch.Tensor] = []
    excess = shift = variance = 0.0
    for prompt, completion, behavior in zip(
        batch.prompt_ids, batch.completion_ids, batch.behavior_logprobs, strict=True
    ):
        logits_TV, drawn_T1 = _completion_logits(model, prompt, completion)
        exact.append(logits_TV.log_softmax(1).gather(1, drawn_T1)[:, 0])
        gaps.append(np.abs(exact[-1].cpu().numpy() - behavior))
        if temperature > 0:
            logprobs_TV = (logits_TV / temperature).log_softmax(1)
            mean_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
            spread_T = (logprobs_TV.exp() * logprobs_TV.square()).sum(1) - mean_T.square()
            excess += float((-logprobs_TV.gather(1, drawn_T1)[:, 0] - mean_T).sum())
            colder_TV = (logits_TV / (temperature / 2)).softmax(1)
            shift += float((-(colder_TV * logprobs_TV).sum(1) - mean_T).sum())
            variance += float(spread_T.clamp(min=0).sum())
    scale = math.sqrt(variance) or math.inf
    plain = 0.0
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
        pairs = zip(batch.prompt_ids, batch.completion_ids, exact, strict=True)
        off = [_drawn_logprobs(model, prompt, text) - known for prompt, text, known in pairs]
        plain = float(torch.cat(off).abs().mean())
    return np.concatenate(gaps), plain, excess / scale, shift / scale


def _completion_logits(model: Any, prompt: Ids, completion: Ids) -> tuple[Any, Any]:
    """Logits of a completion's tokens [T, V] in float32, and their ids [T, 1]."""
    import torch

    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]], device=model.device)
    with torch.inference_mode():
        logits_TV = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1]
    return logits_TV.float(), ids[0, -len(completion) :, None]


def _drawn_logprobs(model: Any, prompt: Ids, completion: Ids) -> Any:
    logits_TV, drawn_T1 = _completion_logits(model, prompt, completion)
    return logits_TV.log_softmax(1).gather(1, drawn_T1)[:, 0]


@check(
    "training can take away what lies between student and teacher, and no more; where nothing lies "
    "between them, every step is noise",
    loads_models=True,
)
def distance(subject: Subject) -> Iterator[Finding]:
    """KL(student || teacher) on the student's own rollouts, as a run would cache them."""
    _check_one_tokenizer(subject)
    if subject.config.teacher is not None and subject.config.teacher.is_rendering:
        raise NotChecked("the teacher reads a rendering of its own")
    with tempfile.TemporaryDirectory() as folder:
        scored = _scored_rollouts(
            Path(folder), subject, subject.config, subject.setup.student, _first_prompts(subject)
        )
        rows = [scored[number] for number in range(len(scored))]
    if not rows:
        raise NotChecked("the teacher refused every rollout")
    gaps_T = [row.behavior_logprobs.astype(np.float64) - row.teacher_logprobs for row in rows]
    counts = [len(gap_T) for gap_T in gaps_T]
    all_T = np.concatenate(gaps_T)
    mean = float(all_T.mean())
    error = ratio_error([float(gap_T.sum()) for gap_T in gaps_T], counts)
    said = (
        f"{mean:.3f} ± {error:.3f} nats a token lie between student and teacher on {sum(counts)} "
        "tokens that the student wrote: what training can take away at most"
    )
    if float((np.expm1(-all_T) + all_T).mean()) > ALIKE:  # k3: never negative, 0 where both agree
        yield distance.ok(said)
    else:
        yield distance.warning(
            said, "the student is as its teacher already, as far as this shows: train another one"
        )


@check(
    "an objective over candidates corrects what these see of the distance to the teacher; the rest "
    "moves as one block",
    loads_models=True,
)
def coverage(subject: Subject) -> Iterator[Finding]:
    """The share of the reverse KL that the config's candidates see, and what would see enough."""
    _check_one_tokenizer(subject)
    _check_has_weights(subject)
    config, setup = subject.config, subject.setup
    if config.teacher is not None and config.teacher.is_rendering:
        raise NotChecked("the teacher reads a rendering of its own")
    if isinstance(config.scores.codec, SampledCodec):
        raise NotChecked("candidates are drawn from the teacher")
    where, top_k, whole = "scores.top_k", config.scores.top_k, "scores.codec={kind: hidden}"
    if isinstance(config.scores.codec, HiddenCodec):
        if config.train.top_k is None:
            raise NotChecked("training rebuilds the whole vocabulary")
        where, top_k, whole = "train.top_k", config.train.top_k, "train.top_k=null"
    with tempfile.TemporaryDirectory() as folder:
        rollouts = _sampled(Path(folder), setup, config, _first_prompts(subject), setup.student)
        batch = rollouts_batch(rollouts.read_unit(0))
    student, teacher = (
        _whole_distributions(model.folder, batch)
        for model in (setup.student, subject.model("teacher"))
    )
    shared = min(student.shape[1], teacher.shape[1])
    own = Support(min(top_k, shared), min(config.rollouts.student_top_k, shared))
    now, *others = support_shares(student[:, :shared], teacher[:, :shared], (own, *SUPPORTS))
    said = (
        f"{where}={own.top_k} with rollouts.student_top_k={own.student_top_k} sees "
        f"{now.share:.0%} ± {now.error:.0%} of the reverse KL and holds {now.student_mass:.0%} of "
        f"the student's mass, {now.teacher_mass:.0%} of the teacher's, on {len(student)} tokens"
    )
    if min(now.share + 2 * now.error, now.student_mass, now.teacher_mass) >= ENOUGH:
        yield coverage.ok(said)
        return
    enough = [_support_text(each) for each in least_supports(others)]
    best = max(others, key=lambda each: each.share)
    todo = f"to see {ENOUGH:.0%}: {', or '.join(enough)}"
    if not enough:
        todo = f"the most of what was tried is {_support_text(best)}"
    yield coverage.warning(
        said, f"{todo}; all of it: {whole}; objective hybrid learns the rest from drawn tokens"
    )


def _support_text(of: SupportShare) -> str:
    both = f" with rollouts.student_top_k={of.student_top_k}" if of.student_top_k else ""
    return f"scores.top_k={of.top_k}{both} ({of.share:.0%}, {of.ids:.0f} ids a token)"


def _whole_distributions(folder: Path, batch: RolloutBatch) -> Floats:
    """Log-probabilities of all ids at some of the batch's tokens, in float32 [N, V]."""
    model, every = _model_of_training(folder), -(-batch.completion_tokens // COVERAGE_TOKENS)
    found = [
        _completion_logits(model, prompt, completion)[0].log_softmax(1).cpu().numpy()[::every]
        for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True)
        if len(completion)
    ]
    return np.concatenate(found)


@check(
    "if the teacher cannot agree with its own cached scores, no student can, and training follows "
    "the difference",
    loads_models=True,
)
def teacher_as_student(subject: Subject) -> Iterator[Finding]:
    """The loss of the teacher's weights on the teacher's cached scores of its own rollouts."""
    _check_one_tokenizer(subject)
    _check_has_weights(subject)
    config, few, teacher = subject.config, _first_prompts(subject), subject.model("teacher")
    with tempfile.TemporaryDirectory() as folder:
        try:
            scored = _scored_rollouts(Path(folder), subject, _teacher_alone(config), teacher, few)
            rows = [scored[number] for number in range(len(scored))]
        except RuntimeError:
            weights = _model_of_training(teacher.folder).parameters()
            if all(bool(weight.isfinite().all()) for weight in weights):
                raise
            rows = []
    if not rows:
        yield teacher_as_student.error(
            "the teacher's log-probabilities of its own rollouts are not finite",
            "look at the teacher's checkpoint: NaN in its weights, or a dtype it overflows in",
        )
        return
    codec = config.scores.codec
    loss, gap_N = _loss_at_teacher(config, teacher.folder, rows)
    # Of a divergence from the row's own distribution: the mean of the candidates' errors under it,
    # and twice that where both sides are normalised over the candidates.
    top = [row.teacher_top_logprobs for row in rows]
    parts = [2 * (np.exp(t, dtype=np.float64) * rounding(codec, t)).sum(1) for t in top]
    weight = sum(part.weight for part in config.train.objective)
    in_loss, in_token = float(np.concatenate(parts).mean()) * weight, drawn_rounding(codec)
    loss_limit, token_limit = LOSS + in_loss, TOKEN + in_token
    said = (
        f"loss {loss:.1e} nats a token, largest gap of a drawn token {gap_N.max():.1e}, over "
        f"{len(gap_N)} tokens in float32 (allowed {loss_limit:.1e} and {token_limit:.1e}, of which "
        f"rounding in the store {in_loss:.1e} and {in_token:.1e})"
    )
    todo = (
        "do not train on these scores: try teacher.engine=transformers and scores.codec={kind: "
        "exact, dtype: float32} to see which of the two is wrong"
    )
    is_well = abs(loss) <= loss_limit and gap_N.max() <= token_limit
    yield teacher_as_student.ok(said) if is_well else teacher_as_student.error(said, todo)


def _teacher_alone(config: Config) -> Config:
    """The teacher as its own student, in float32 at temperature 1."""
    assert config.teacher is not None
    # Both read what the student reads.
    fields = {**config.teacher.model_dump(include=set(Model.model_fields)), "dtype": "float32"}
    plain = config.rollouts.model_copy(update={"temperature": 1.0})
    models = {"student": Student(**fields), "teacher": Teacher(**fields)}
    return config.model_copy(update={**models, "rollouts": plain})


def _scored_rollouts(
    folder: Path, subject: Subject, config: Config, student: Checkpoint, few: pa.Table
) -> ScoredRows:
    """Rollouts of a student with the teacher's scores, as a run makes them."""
    setup, teacher = subject.setup, subject.model("teacher")
    if isinstance(config.scores.codec, HiddenCodec):  # what it rounds is checked in every unit
        codec = ExactCodec(dtype="float32")
        scores = config.scores.model_copy(update={"codec": codec})
        config = config.model_copy(update={"scores": scores})
    assert config.teacher is not None
    rollouts, store = _sampled(folder, setup, config, few, student), Store(folder)
    key, forced_ids = rollouts.fingerprint, setup.forced_ids
    if teacher.is_served:  # this store does not know it
        teacher = open_served_checkpoint(store, config.teacher, first_contact=lambda engine: None)
    scores = store.artifact(
        scores_recipe(
            config,
            rollouts=key,
            teacher=teacher,
            forced_ids=forced_ids,
            vocabulary=setup.candidates,
            prompts=rollouts.recipe.inputs["prompts"],
        )
    )
    scores.create(rows=few.num_rows, rows_per_unit=few.num_rows)
    task = replace(_task(rollouts, student), scores=scores.fingerprint, teacher=str(teacher.folder))
    _work(ScoreWorker, folder, config.teacher, task)
    return ScoredRows([(rollouts, scores)])


def _loss_at_teacher(
    config: Config, folder: Path, rows: Sequence[ScoredRow]
) -> tuple[float, Floats]:
    """The config's loss at the teacher's weights; |log p - log q| of each drawn token [N], nats."""
    import torch

    from opd_stream.batches import collate
    from opd_stream.engines.head import output_head
    from opd_stream.engines.reading import decoder_of, rows_hidden
    from opd_stream.logprobs import sampled_logprobs
    from opd_stream.loss import batch_loss
    from opd_stream.objectives import SampledPg

    model = _model_of_training(folder)
    batch = collate(rows, window_tokens=TOKENS).to(model.device)
    objectives = config.train.objective
    kept = [part for part in objectives if part.is_zero_at_teacher and part.reads != "draws"]
    with torch.no_grad():
        hidden = rows_hidden(decoder_of(model), batch.input_ids_BL, batch.attention_mask_BL)
        head = output_head(model)
        rows_NH, ids_N = hidden.flatten(0, 1)[batch.hidden_rows_N], batch.completion_ids_N
        own_N = sampled_logprobs(rows_NH, head, ids_N, chunk_rows=head.chunk_rows)
        merges = config.train.guards.merge_terminators
        found = batch_loss(hidden, head, batch, kept or [SampledPg()], merge_terminators=merges)
    return float(found.loss), (own_N - batch.teacher_logprobs_N).abs().cpu().numpy()


@check(
    "scores in the store are trained on as they are; if the teacher, its engine or the bytes "
    "changed, the student learns from something that no longer exists",
    loads_models=True,
)
def cached_scores(subject: Subject) -> Iterator[Finding]:
    """Two rows of the first round, scored again alone and together, against the store."""
    _check_one_tokenizer(subject)
    _check_has_weights(subject)
    teacher, opened = subject.config.teacher, subject.setup
    if teacher is None:
        raise NotChecked("the config names no teacher")
    cache = next(rounds(opened)).caches[-1]
    rollouts, scores = cache.rollouts.shards, cache.scores.shards
    name, settings = scores.name, scores.recipe.settings
    units = sorted(set(rollouts.commits()) & set(scores.commits()))
    rows = ScoredRows([(rollouts, scores)], units=[units]) if units else []
    if not units:
        yield _none_cached(opened, scores)
    elif "engine" not in settings:
        yield cached_scores.warning(
            f"{name} was imported; which teacher scored it is not known",
            "compare it with that teacher before it is trained on",
        )
    elif not len(rows):
        yield cached_scores.error(
            f"no row of {name} can be trained on",
            "look at the teacher's checkpoint, and score again",
        )
    else:
        folder, chosen = subject.model("teacher").folder, [rows[0], rows[len(rows) - 1]]
        if (prompts := scores.recipe.inputs.get("prompts")) is not None:
            ids = prompt_ids_of(opened.store, prompts)  # in the teacher's own rendering
            chosen = [replace(row, prompt_ids=ids[row.prompt_id]) for row in chosen]
        live = in_own_process(settings["engine"], _scored_live, folder, teacher, settings, chosen)
        yield _compared(scores, chosen, live)


def _compared(scores: Artifact, rows: Sequence[ScoredRow], live: LiveScores | None) -> Finding:
    """Cached scores against today's, in units of what two ways of batching differ by."""
    if live is None:
        return cached_scores.error(
            f"the teacher's log-probabilities for {scores.name} are not finite today",
            "look at the teacher's checkpoint",
        )
    alone, together = live
    control_N = np.concatenate([_gaps(*pair) for pair in zip(alone, together, strict=True)])
    codec = codec_of(scores.recipe.settings["codec"])
    pairs = zip(rows, alone, strict=True)
    stored_N = np.concatenate([_gaps_beyond_rounding(codec, row, now) for row, now in pairs])
    mean, largest = (CONTROLS * g + FLOOR for g in (control_N.mean(), control_N.max()))
    said = (
        f"{scores.name}, 2 rows: beyond the codec's rounding, cached and live differ by "
        f"{stored_N.mean():.1e} nats in the mean, {stored_N.max():.1e} at most; live in batches of "
        f"1 and 2 differ by {control_N.mean():.1e} and {control_N.max():.1e} (allowed {mean:.1e} "
        f"and {largest:.1e})"
    )
    todo = f"restore the teacher that scored them, or remove {scores.folder} to score again"
    is_well = stored_N.mean() <= mean and stored_N.max() <= largest
    return cached_scores.ok(said) if is_well else cached_scores.error(said, todo)


def _none_cached(setup: Setup, scores: Artifact) -> Finding:
    """Nothing is there; were the same rollouts scored by another teacher?"""
    nearest = setup.store.nearest(scores.recipe)
    if nearest is not None and set(nearest[1]) == {"inputs.teacher"}:
        old, new = nearest[1]["inputs.teacher"]
        return cached_scores.warning(
            f"the store has these rollouts scored by teacher {str(old)[:12]}; the config's is "
            f"{str(new)[:12]}: its weights, tokenizer or architecture are others, and all is "
            "scored again",
            "restore the teacher if it was not meant to change",
        )
    return cached_scores.ok("no scores of this config are in the store yet")


def _scored_live(
    folder: Path, model: Model, settings: dict[str, Any], rows: Sequence[ScoredRow]
) -> LiveScores | None:
    """Today's scores of each row alone, and of all together; None: not finite."""
    engine = open_engine(
        engine=settings["engine"],
        folder=folder,
        dtype=settings["dtype"],
        batch_rows=model.batch_rows,
        vllm=model.vllm,
    )
    asked = ScoringSettings(
        top_k=settings["top_k"],
        forced_ids=tuple(settings["forced_ids"]),
        vocabulary=settings.get("vocabulary"),
    )

    def scored(batch: RolloutBatch) -> list[RowScores]:
        found = engine.score(batch, asked)
        assert found.candidate_teacher_logprobs is not None
        pairs = zip(found.teacher_logprobs, found.candidate_teacher_logprobs, strict=True)
        return [] if found.refused else [RowScores(*pair) for pair in pairs]

    alone = [each for row in rows for each in scored(_batch([row]))]
    together = scored(_batch(rows))
    return (alone, together) if len(alone) == len(together) == len(rows) else None


def _batch(rows: Sequence[ScoredRow]) -> RolloutBatch:
    """Rows as the engine takes them; the cached ids stand as candidates, so they are scored too."""
    top = [row.teacher_top_ids.astype(np.int64) for row in rows]
    width = max(ids.shape[1] for ids in top)
    return RolloutBatch(
        prompt_id=tuple(row.prompt_id for row in rows),
        sample_index=np.array([row.sample_index for row in rows], np.int32),
        prompt_ids=tuple(row.prompt_ids for row in rows),
        completion_ids=tuple(row.completion_ids for row in rows),
        behavior_logprobs=tuple(row.behavior_logprobs for row in rows),
        finish_reason=("length",) * len(rows),
        candidate_ids=tuple(np.pad(ids, [(0, 0), (0, width - ids.shape[1])]) for ids in top),
    )


def _gaps(left: RowScores, right: RowScores) -> NDArray[np.float64]:
    """|left - right| over drawn tokens and probable candidates."""
    width = min(left.candidates_TK.shape[1], right.candidates_TK.shape[1])
    a, b = (
        np.concatenate([side.drawn_T, side.candidates_TK[:, :width].reshape(-1)]).astype(np.float64)
        for side in (left, right)
    )
    is_drawn = np.arange(len(a)) < len(left.drawn_T)
    kept = np.isfinite(a) & np.isfinite(b) & (is_drawn | (np.maximum(a, b) > PROBABLE))
    return np.abs(a - b)[kept]


def _gaps_beyond_rounding(codec: Codec, row: ScoredRow, live: RowScores) -> NDArray[np.float64]:
    """How much further the stored values are than their codec's rounding explains."""
    top_TK = row.teacher_top_logprobs
    if isinstance(codec, SampledCodec):  # counts of draws, which no second pass repeats
        top_TK = np.full_like(top_TK, -np.inf)
    now_TK = live.candidates_TK[:, : top_TK.shape[1]]

    def nearest(stored: Floats, now: Floats, error: Any) -> Floats:
        return np.where(np.isfinite(stored), now + np.clip(stored - now, -error, error), now)

    explained = RowScores(
        nearest(row.teacher_logprobs, live.drawn_T, drawn_rounding(codec)),
        nearest(top_TK, now_TK, rounding(codec, now_TK)),
    )
    return _gaps(RowScores(row.teacher_logprobs, top_TK), explained)


def rounding(codec: Codec, logprobs: Floats) -> NDArray[np.float64]:
    """Largest error of each stored log-probability of a candidate, nats."""
    values = np.where(np.isfinite(logprobs), logprobs, 0.0).astype(np.float64)
    match codec:
        case CompactCodec(max_error=error):
            return np.full_like(values, error)
        case HiddenCodec():
            return np.full_like(values, HIDDEN_MAX_ERROR)
        case ExactCodec(dtype="float16"):
            return np.abs(values) * HALF_UNIT
        case _:
            return np.zeros_like(values)


def drawn_rounding(codec: Codec) -> float:
    """Largest error of a drawn token's stored log-probability, nats."""
    if isinstance(codec, HiddenCodec):
        return HIDDEN_MAX_ERROR
    return codec.max_error if isinstance(codec, CompactCodec) else 0.0


def _first_prompts(subject: Subject) -> pa.Table:
    """The prompts of a trial."""
    if subject.config.replay is not None:
        raise NotChecked("a replay samples and scores nothing")
    return subject.table("prompts").slice(0, ROWS)


def _check_one_tokenizer(subject: Subject) -> None:
    if subject.setup.alignment is not None:
        raise NotChecked("the teacher reads the texts in another tokenizer")


def _check_has_weights(subject: Subject) -> None:
    if subject.model("teacher").is_served:
        raise NotChecked("the teacher's weights are a server's")


def _sampled(
    folder: Path, setup: Setup, config: Config, few: pa.Table, student: Checkpoint
) -> Artifact:
    """Rollouts of a few prompts in a store of their own."""
    store, rows = Store(folder), few.num_rows
    prompts = store.artifact(setup.prompts.recipe)
    prompts.create(rows=rows, rows_per_unit=rows)
    prompts.commit(0, few, counts={"rows": rows})
    few_rows = {"prompts_per_round": rows, "samples_per_prompt": 1, "environment": None}
    recipe = rollouts_recipe(
        config.model_copy(update={"rollouts": config.rollouts.model_copy(update=few_rows)}),
        prompts=prompts.fingerprint,
        student=student,
        vocabulary=setup.vocabulary,
        round_index=0,
        window_tokens=min(TOKENS, largest_window(config)),
    )
    rollouts = store.artifact(recipe)
    rollouts.create(rows=rows, rows_per_unit=rows)
    _work(GenerateWorker, folder, config.student, _task(rollouts, student))
    return rollouts


def _task(rollouts: Artifact, student: Checkpoint) -> Task:
    return Task(
        unit=0,
        rollouts=rollouts.fingerprint,
        scores=None,
        student=str(student.folder),
        teacher=None,
        made_by="doctor",
    )


def _work(kind: type[Worker], folder: Path, model: Model, task: Task) -> None:
    settings = WorkerSettings(
        store=str(folder),
        batch_rows=model.batch_rows,
        vllm=model.vllm,
        server=model.server if isinstance(model, Teacher) else None,
    )
    in_own_process(model.engine, _do_task, kind, settings, task)
    gc.collect()  # the engine's weights make room for the next


def _do_task(kind: type[Worker], settings: WorkerSettings, task: Task) -> None:
    kind(settings).work(TaskResult(task=task))


def in_own_process(engine: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; an engine that changes its process gets one of its own."""
    if engine != "vllm":
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _model_of_training(folder: Path) -> Any:
    """The model that training loads, in float32, on the device it would train on."""
    import torch

    from stages.student_model import load_student

    student = load_student(folder, lora=None, initial=folder, gradient_checkpointing=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return student.model.to(device).eval()
