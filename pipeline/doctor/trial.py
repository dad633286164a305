"""A few rollouts through a throwaway store, computed again by the pass that training takes.

The workers, codec, shards and reader are those of a run. Two laws are tried: a student that is its
own teacher has nothing to learn, and what an engine says of the tokens it drew is what a plain
forward pass at temperature 1 says.
"""

import gc
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from opd_stream.config import Config
from opd_stream.config.collection import Model, Student
from opd_stream.store.reader import ScoredRows
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from pipeline.contexts import largest_window
from pipeline.doctor.findings import Check, Finding
from pipeline.doctor.rounding import of_divergence, of_drawn
from pipeline.setup import Setup
from stages.checkpoints import Checkpoint
from stages.generate import GenerateWorker
from stages.recipes import rollouts_recipe, scores_recipe
from stages.score import ScoreWorker
from stages.workers import Task, TaskResult, Worker, WorkerSettings

SELF = Check(
    name="teacher-as-student",
    why="if the teacher cannot agree with its own cached scores, no student can, and training "
    "follows the difference",
)
SAMPLER = Check(
    name="sampler",
    why="drift and importance weights compare training with the log-probabilities that the engine "
    "recorded; an error there looks like a student that has moved",
)
ROWS, TOKENS = 8, 64  # of a trial
LOSS = 1e-4  # nats a token in float32; what the codec rounds is added
TOKEN = 1e-3  # nats, largest of a drawn token in float32; what the codec rounds is added
RECORDED = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}  # nats, mean over tokens
DEVIATIONS = 5.0  # of the mean surprise from its expectation
ZERO_AT_TEACHER = {"bucket", "skew", "lsm", "hybrid", "sampled_pg", "entropy_aware"}
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfScores:
    """What training measures when the student is the teacher."""

    tokens: int
    loss: float  # of the config's objectives, nats a token
    largest: float  # |log p - log q| of a drawn token, nats
    loss_rounding: float  # what the codec may add to the loss, nats a token
    token_rounding: float  # and to a drawn token, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Log-probabilities that an engine recorded against those of a forward pass."""

    tokens: int
    mean: float  # |recorded - computed|, nats
    largest: float
    deviations: float  # of the surprise of the drawn tokens from its expectation, in sigmas
    power: float  # where that would stand, were the tokens drawn at half the temperature
    temperature: float  # at which the expectation was taken


def teacher_as_student(setup: Setup, prompts: pa.Table, teacher: Checkpoint) -> list[Finding]:
    """The loss of the teacher's weights on the teacher's cached scores of its own rollouts."""
    found = self_scores(setup, prompts, teacher)
    if found is None:
        return [
            SELF.error(
                "the teacher's log-probabilities of its own rollouts are not finite",
                "look at the teacher's checkpoint: NaN in its weights, or a dtype it overflows in",
            )
        ]
    loss_limit, token_limit = LOSS + found.loss_rounding, TOKEN + found.token_rounding
    told = (
        f"loss {found.loss:.1e} nats a token, largest gap of a drawn token {found.largest:.1e}, "
        f"over {found.tokens} tokens in float32 (allowed {loss_limit:.1e} and {token_limit:.1e}, "
        f"of which rounding in the store {found.loss_rounding:.1e} and {found.token_rounding:.1e})"
    )
    is_zero = abs(found.loss) <= loss_limit and found.largest <= token_limit
    if is_zero:
        return [SELF.ok(told)]
    return [
        SELF.error(
            told,
            "do not train on these scores: try teacher.engine=transformers and scores.codec={kind: "
            "exact, dtype: float32} to see which of the two is wrong",
        )
    ]


def sampler(setup: Setup, prompts: pa.Table) -> list[Finding]:
    """The student's engine: recorded log-probabilities, and the temperature it draws at."""
    config = setup.config
    found = recorded(setup, prompts)
    limit = RECORDED[config.student.dtype]
    told = (
        f"recorded log-probabilities differ from a forward pass at temperature 1 by "
        f"{found.mean:.1e} nats in the mean, {found.largest:.1e} at most, over {found.tokens} "
        f"tokens (allowed {limit:g} in the mean, {config.student.dtype})"
    )
    findings: list[Finding] = []
    if not found.mean <= limit:
        findings.append(
            SAMPLER.error(
                told,
                "the engine records another distribution (after temperature, top-p or a penalty), "
                "or runs other weights: try student.engine=transformers, student.dtype=float32",
            )
        )
    tells = abs(found.power) > DEVIATIONS
    if tells and abs(found.deviations) > DEVIATIONS:
        findings.append(
            SAMPLER.error(
                f"drawn tokens are {'more' if found.deviations > 0 else 'less'} surprising than at "
                f"temperature {found.temperature:g}, by {abs(found.deviations):.1f} standard "
                f"deviations over {found.tokens} tokens (allowed {DEVIATIONS:g})",
                "the engine draws from another distribution than rollouts.temperature says; look "
                "for top-k, top-p, penalties or a generation_config.json that it applies",
            )
        )
    if config.rollouts.temperature not in (0.0, 1.0):
        findings.append(
            SAMPLER.warning(
                f"rollouts.temperature is {config.rollouts.temperature:g}: tokens are drawn from "
                "another distribution than the one whose log-probabilities are recorded",
                "set rollouts.temperature=1, which keeps the objectives' gradients exact",
            )
        )
    surprise = (
        f"; surprise of the drawn tokens {found.deviations:+.1f} standard deviations (half the "
        f"temperature: {found.power:+.1f}{'' if tells else ', too little to tell'})"
    )
    return findings or [SAMPLER.ok(told + surprise)]


def self_scores(setup: Setup, prompts: pa.Table, teacher: Checkpoint) -> SelfScores | None:
    """Sample and score the teacher, then train on it without a step; None: nothing is finite."""
    import torch

    from opd_stream.batch_loss import batch_loss
    from opd_stream.batches import collate
    from opd_stream.engines.head import output_head
    from opd_stream.logprobs import sampled_logprobs
    from opd_stream.objectives import build_objectives

    config = _as_both(setup.config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            reader = _scored_rollouts(Path(folder), setup, config, prompts, teacher)
        except RuntimeError:
            if _is_finite(teacher.folder):
                raise
            return None
        rows = [reader[number] for number in range(len(reader))]
    if not rows:
        return None
    batch = collate(rows, window_tokens=TOKENS)
    codec = config.scores.codec.model_dump()
    rounding = np.concatenate([of_divergence(codec, row) for row in rows])
    model = _trained(teacher.folder)
    objectives = [part.model_dump() for part in config.train.objective]
    kept = [part for part in objectives if part["kind"] in ZERO_AT_TEACHER]
    batch = batch.to(model.device)
    with torch.no_grad():
        hidden = model.get_decoder()(
            input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, use_cache=False
        ).last_hidden_state
        head = output_head(model)
        own_N = sampled_logprobs(
            hidden.flatten(0, 1)[batch.hidden_rows_N],
            head,
            batch.completion_ids_N,
            chunk_rows=head.chunk_rows,
        )
        gap_N = (own_N - batch.teacher_logprobs_N).abs()
        found = batch_loss(
            hidden,
            head,
            batch,
            build_objectives(kept or [{"kind": "sampled_pg"}]),
            merge_terminators=config.train.guards.merge_terminators,
        )
    return SelfScores(
        tokens=len(gap_N),
        loss=float(found.loss),
        largest=float(gap_N.max()),
        loss_rounding=float(rounding.mean()) * sum(part.weight for part in config.train.objective),
        token_rounding=of_drawn(codec),
    )


def recorded(setup: Setup, prompts: pa.Table) -> Recorded:
    """Sample the student as the run does, and read each rollout once more, whole."""
    import torch

    config = setup.config
    with tempfile.TemporaryDirectory() as folder:
        batch = _rollouts(Path(folder), setup, config, prompts, setup.student)[1]
    temperature = config.rollouts.temperature
    model = _trained(setup.student.folder)
    gaps: list[Any] = []
    excess = shift = variance = 0.0
    for prompt, completion, behavior in zip(
        batch.prompt_ids, batch.completion_ids, batch.behavior_logprobs, strict=True
    ):
        ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]], device=model.device)
        with torch.inference_mode():
            logits_TV = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1]
        logits_TV = logits_TV.float()
        drawn_T1 = ids[0, -len(completion) :, None]
        raw_T = logits_TV.log_softmax(1).gather(1, drawn_T1)[:, 0].cpu()
        gaps.append((raw_T - torch.from_numpy(behavior.copy())).abs())
        if temperature > 0:
            logprobs_TV = (logits_TV / temperature).log_softmax(1)
            mean_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
            spread_T = (logprobs_TV.exp() * logprobs_TV.square()).sum(1) - mean_T.square()
            excess += float((-logprobs_TV.gather(1, drawn_T1)[:, 0] - mean_T).sum())
            colder_TV = (logits_TV / (temperature / 2)).softmax(1)
            shift += float((-(colder_TV * logprobs_TV).sum(1) - mean_T).sum())
            variance += float(spread_T.clamp(min=0).sum())
    gap_N = torch.cat(gaps)
    return Recorded(
        tokens=len(gap_N),
        mean=float(gap_N.mean()),
        largest=float(gap_N.max()),
        deviations=excess / math.sqrt(variance) if variance else 0.0,
        power=shift / math.sqrt(variance) if variance else 0.0,
        temperature=temperature,
    )


def in_own_process(engine: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; an engine that changes its process gets one of its own."""
    if engine != "vllm":
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _as_both(config: Config) -> Config:
    """The config with the teacher in both roles, in float32, at temperature 1."""
    assert config.teacher is not None
    fields = {**config.teacher.model_dump(), "dtype": "float32"}
    return config.model_copy(
        update={
            "student": Student(**fields),
            "teacher": Model(**fields),
            "rollouts": config.rollouts.model_copy(update={"temperature": 1.0}),
        }
    )


def _rollouts(
    folder: Path, setup: Setup, config: Config, prompts: pa.Table, student: Checkpoint
) -> tuple[Task, RolloutBatch]:
    """Rollouts of a few prompts in a store of their own."""
    store = Store(folder)
    few = prompts.slice(0, ROWS)
    named = store.artifact(setup.prompts.recipe)
    named.create(rows=few.num_rows, rows_per_unit=few.num_rows)
    named.commit(0, few, counts={"rows": few.num_rows})
    sampling = config.rollouts.model_copy(
        update={"prompts_per_round": few.num_rows, "samples_per_prompt": 1}
    )
    recipe = rollouts_recipe(
        config.model_copy(update={"rollouts": sampling}),
        prompts=named.fingerprint,
        student=student,
        stop_ids=setup.stop_ids,
        round_index=0,
        window_tokens=min(TOKENS, largest_window(config)),
    )
    rollouts = store.artifact(recipe)
    rollouts.create(rows=few.num_rows, rows_per_unit=few.num_rows)
    task = Task(
        unit=0,
        rollouts=rollouts.fingerprint,
        scores=None,
        student=str(student.folder),
        teacher=None,
        made_by="doctor",
    )
    _work(GenerateWorker, folder, config.student, task)
    return task, rollouts_batch(rollouts.read_unit(0))


def _scored_rollouts(
    folder: Path, setup: Setup, config: Config, prompts: pa.Table, teacher: Checkpoint
) -> ScoredRows:
    """Rows as training reads them."""
    assert config.teacher is not None
    task, batch = _rollouts(folder, setup, config, prompts, teacher)
    store = Store(folder)
    recipe = scores_recipe(
        config, rollouts=task.rollouts, teacher=teacher, forced_ids=setup.forced_ids
    )
    scores = store.artifact(recipe)
    scores.create(rows=len(batch), rows_per_unit=len(batch))
    task = replace(task, scores=scores.fingerprint, teacher=str(teacher.folder))
    _work(ScoreWorker, folder, config.teacher, task)
    return ScoredRows([(store.by_fingerprint("rollouts", task.rollouts), scores)])


def _work(kind: type[Worker], folder: Path, model: Model, task: Task) -> None:
    settings = WorkerSettings(store=str(folder), batch_rows=model.batch_rows, vllm=model.vllm)
    in_own_process(model.engine, _do_task, kind, settings, task)
    gc.collect()  # the engine's weights make room for the next


def _do_task(kind: type[Worker], settings: WorkerSettings, task: Task) -> None:
    kind(settings).work(TaskResult(task=task))


def _is_finite(folder: Path) -> bool:
    return all(bool(weight.isfinite().all()) for weight in _trained(folder).parameters())


def _trained(folder: Path) -> Any:
    """The model that training loads, in float32, on the device it would train on."""
    import torch

    from stages.student_model import load_student

    student = load_student(folder, lora=None, initial=folder, gradient_checkpointing=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return student.model.to(device).eval()
