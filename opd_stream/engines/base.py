"""The interface of every engine, and the parts of it that need no library.

An engine holds one set of weights at a time. Teacher and student are roles, not classes. Sampling
is a function of (weights, prompt, `seed`, `prompt_id`, `sample_index`) and of nothing else that
matters: the k-th token of a rollout uses the k-th number of that rollout's own random stream, so a
longer window continues the same rollout and another batch size changes nothing but rounding.

Shapes: T completion tokens, K candidates of the teacher, F forced ids, M candidates of the student.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd_stream.errors import UserError
from opd_stream.section import Section
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

if TYPE_CHECKING:
    from opd_stream.fused import OutputHead

Ids = NDArray[np.integer[Any]]

LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # of scoring: a CPU's caches hold them
MIN_CHUNK_ROWS = 64  # however large the vocabulary: below, the head's product is slow
MAX_LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**28}  # what a chunk of the fewest rows may reach


class Drawn(NamedTuple):
    """What a rollout grew by."""

    ids: NDArray[np.int32]  # [T], or [T, M] where several are drawn at each position
    logprobs: NDArray[np.float32]  # of the ids
    top_ids: NDArray[np.int32] | None = None  # [T, S], where they are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How rollouts are drawn. The defaults of `top_p`, `top_k` and `min_p` leave no token out.

    Example:
        >>> SamplingSettings(window_tokens=64, temperature=1.0, seed=7, stop_ids=(1,))
    """

    window_tokens: int  # that a completion may have
    stop_ids: tuple[int, ...]  # any of them ends a rollout, and is kept
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    vocabulary: int | None = None  # ids from here on are never drawn; None: the head's size
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    student_top_k: int = 0  # most probable ids that are kept of each position


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """What is asked of a teacher.

    Example:
        >>> ScoringSettings(top_k=32, forced_ids=(1,))
    """

    top_k: int  # candidates of a token
    forced_ids: tuple[int, ...] = ()  # always scored
    draws: int = 0  # above 0: so many ids drawn with replacement, in place of the top K
    seed: int = 0  # of the draws
    vocabulary: int | None = None  # ids from here on are no candidates; None: the head's size


class VllmOptions(Section):
    """How engine vllm uses its device (placement only)."""

    memory_share: float = Field(
        default=0.8, gt=0, le=1, description="of the device; logits need some of the rest"
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        le=2**50,
        description="for keys and values, instead of what the share leaves",
    )
    max_context: int | None = Field(
        default=None, ge=2, description="tokens of prompt and completion; null: the model's"
    )
    tensor_parallel: int = Field(default=1, ge=1, le=1024, description="devices of one worker")
    batched_tokens: int = Field(
        default=8192, ge=64, description="of a forward pass; bounds the logits in scoring"
    )
    compiled: bool = Field(default=True, description="graphs and compilation; no: starts faster")


class Engine(Protocol):
    """A language model that samples and scores."""

    def load(self, folder: Path) -> None:
        """Replace the weights by those of a Hugging Face folder with the same architecture.

        The old weights are released before the new ones are read; if reading fails, there are none
        until another `load`.
        """
        ...

    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """Sample up to `window_tokens` new tokens for each prompt, `samples_per_prompt` times.

        A rollout ends with the first id of `stop_ids` it draws (kept, finish_reason "stop") or at
        the window (finish_reason "length"). Temperature 0 is greedy. `behavior_logprobs` are raw:
        log-softmax of all logits before temperature, whatever the draw left out. With `extra_draws`
        M, M further ids are drawn at every position from the same distribution, with replacement,
        and kept as candidates; they do not change what is sampled. With `student_top_k` S, the S
        most probable ids of every position (below `vocabulary`) are kept as `student_top_ids`.

        Raises:
            UserError: a prompt plus the window does not fit the model's context, or there are
                fewer than `student_top_k` tokens.
        """
        ...

    def extend(self, rollouts: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
        """Continue the rollouts that a window ended, up to `window_tokens` tokens each.

        Finished ones stay. New tokens have the log-probabilities of the current weights. Under the
        weights, seed and temperature of the first sampling, the result is what `sample` with the
        longer window would have given. Candidates that were drawn are not kept.

        Raises:
            UserError: a row plus the window does not fit the model's context.
        """
        ...

    def score(self, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
        """Score every completion token at temperature 1 over the full vocabulary.

        Candidate ids of the rollouts are scored too; their `student_top_ids` join the top K, and
        the tail is that of the union. With `draws` above 0, the top K are replaced
        by that many ids drawn from the teacher with replacement, a function of `seed` and the
        rollout. The mass of ids that are no candidates is in the tail.

        Raises:
            UserError: `top_k` is larger than the vocabulary.
        """
        ...


class HiddenStates(NamedTuple):
    """What the output head reads to predict the completion tokens of R rollouts."""

    states: tuple[NDArray[np.float32], ...]  # R x [T, H], after the last norm, unrounded
    logprobs: tuple[NDArray[np.float32], ...]  # R x [T], of the tokens, by the engine's own head


class HiddenEngine(Engine, Protocol):
    """An engine whose whole distributions can be rebuilt elsewhere: hidden states times the head.

    Of the built-in engines transformers is one; one of the user's own may be.
    """

    def hidden(self, rollouts: RolloutBatch) -> HiddenStates:
        """The hidden states that predict every completion token.

        Raises:
            UserError: a row does not fit the model's context.
        """
        ...

    def head(self) -> "OutputHead":
        """The output head, which makes logits of the hidden states; weights may be shared.

        Raises:
            UserError: the head is no linear layer.
        """
        ...


@runtime_checkable
class CheckedEngine(Engine, Protocol):
    """An engine whose model is not a file: it is asked before work whether it is the right one."""

    noise: float  # mean |difference| of two answers to one question, nats

    def check(self, settings: ScoringSettings, *, own_ids: bool) -> None:
        """Ask for a few scores as those of rollouts will be asked for.

        Args:
            settings: of the scores.
            own_ids: whether rollouts hold ids of the student's own to be scored.

        Raises:
            UserError: they are not given, or another model answers.
        """
        ...


class RowScores(NamedTuple):
    """The scores of one rollout, log-probabilities in nats."""

    asked: NDArray[np.float32]  # [T, 1 + M], of the sampled token, then of the student's candidates
    top_ids: NDArray[np.int32]  # [T, K]
    top_logprobs: NDArray[np.float32]  # [T, K]
    tail: NDArray[np.float32]  # [T]
    forced: NDArray[np.float32]  # [T, F]


def with_own(
    ids_TK: Ids,
    logprobs_TK: NDArray[np.floating[Any]],
    own_ids_TS: Ids,
    own_logprobs_TS: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The union of the teacher's candidates and the student's ids, by rank [T, K + S].

    An id of both counts once: id 0 and -inf fill up.
    """
    is_known = (own_ids_TS[:, :, None] == ids_TK[:, None]).any(2)
    more_TS = np.where(is_known, -np.inf, own_logprobs_TS)
    logprobs = np.concatenate([logprobs_TK, more_TS], axis=1).astype(np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    logprobs = np.take_along_axis(logprobs, order, axis=1)
    ids = np.take_along_axis(np.concatenate([ids_TK, own_ids_TS], axis=1), order, axis=1)
    return np.where(logprobs > -np.inf, ids, 0).astype(np.int32), logprobs


def ranked_union(
    dense_TV: NDArray[np.floating[Any]], top_ids_TK: Ids, own_ids_TS: Ids | None
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Candidates of whole distributions: ids, log-probabilities, and the tail [T].

    The teacher's own, by rank, and those of the student, where there are any.
    """
    ids = top_ids_TK.astype(np.int64)
    top = np.take_along_axis(dense_TV, ids, axis=1).astype(np.float32)
    rest_TV = np.exp(dense_TV, dtype=np.float64)
    np.put_along_axis(rest_TV, ids, 0.0, axis=1)
    if own_ids_TS is not None:
        own = own_ids_TS.astype(np.int64)
        np.put_along_axis(rest_TV, own, 0.0, axis=1)
        ids, top = with_own(ids, top, own, np.take_along_axis(dense_TV, own, axis=1))
    with np.errstate(divide="ignore"):
        tail_T = np.log(rest_TV.sum(1))
    return ids.astype(np.int32), top, tail_T.astype(np.float32)


def score_batch(rows: Iterable[RowScores], rollouts: RolloutBatch) -> ScoreBatch:
    """The scores of all rows; one with a value that is not a number is refused alone."""
    kept: list[RowScores] = []
    refused: dict[int, str] = {}
    for number, row in enumerate(rows):
        if any(np.isnan(column).any() for column in row):
            refused[number] = "the teacher's log-probabilities are not finite"
            row = RowScores(
                row.asked[:0], row.top_ids[:0], row.top_logprobs[:0], row.tail[:0], row.forced[:0]
            )
        kept.append(row)
    if rollouts.student_top_ids is not None:  # a union has as many ids as the two sides differ in
        widths = [(row.top_logprobs > -np.inf).sum(1).max(initial=0) for row in kept]
        widest = max(widths, default=0)
        kept = [
            row._replace(top_ids=row.top_ids[:, :widest], top_logprobs=row.top_logprobs[:, :widest])
            for row in kept
        ]
    return ScoreBatch(
        teacher_logprobs=tuple(row.asked[:, 0] for row in kept),
        teacher_top_ids=tuple(row.top_ids for row in kept),
        teacher_top_logprobs=tuple(row.top_logprobs for row in kept),
        teacher_tail_logprobs=tuple(row.tail for row in kept),
        teacher_forced_logprobs=tuple(row.forced for row in kept),
        refused=refused,
        candidate_teacher_logprobs=(
            None if rollouts.candidate_ids is None else tuple(row.asked[:, 1:] for row in kept)
        ),
    )


def empty_rollouts(
    prompts: PromptBatch, samples_per_prompt: int, *, student_top_k: int = 0
) -> RolloutBatch:
    """Rows without a token yet: to extend them is to sample."""
    rows = [prompt for prompt in range(len(prompts.prompt_id)) for _ in range(samples_per_prompt)]
    samples = np.arange(samples_per_prompt, dtype=np.int32)
    return RolloutBatch(
        prompt_id=tuple(prompts.prompt_id[prompt] for prompt in rows),
        sample_index=np.tile(samples, len(prompts.prompt_id)),
        prompt_ids=tuple(prompts.prompt_ids[prompt] for prompt in rows),
        completion_ids=tuple(np.zeros(0, np.int32) for _ in rows),
        behavior_logprobs=tuple(np.zeros(0, np.float32) for _ in rows),
        finish_reason=tuple("length" for _ in rows),
        student_top_ids=(
            tuple(np.zeros((0, student_top_k), np.int32) for _ in rows) if student_top_k else None
        ),
    )


def unfinished_rows(rollouts: RolloutBatch, window_tokens: int) -> list[int]:
    """Rows that a window shorter than `window_tokens` ended."""
    return [
        row
        for row, reason in enumerate(rollouts.finish_reason)
        if reason == "length" and len(rollouts.completion_ids[row]) < window_tokens
    ]


def extended_rollouts(
    rollouts: RolloutBatch, new: Mapping[int, Drawn], stop_ids: tuple[int, ...]
) -> RolloutBatch:
    """The rollouts with what was drawn at the end of some rows."""
    ids, logprobs = list(rollouts.completion_ids), list(rollouts.behavior_logprobs)
    reasons, tops = list(rollouts.finish_reason), list(rollouts.student_top_ids or ())
    for row, drawn in new.items():
        ids[row] = np.concatenate([ids[row], drawn.ids])
        logprobs[row] = np.concatenate([logprobs[row], drawn.logprobs]).astype(np.float32)
        if tops and drawn.top_ids is not None:
            tops[row] = np.concatenate([tops[row], drawn.top_ids])
        is_stopped = len(ids[row]) and int(ids[row][-1]) in stop_ids
        reasons[row] = "stop" if is_stopped else "length"
    return replace(
        rollouts,
        completion_ids=tuple(ids),
        behavior_logprobs=tuple(logprobs),
        finish_reason=tuple(reasons),
        candidate_ids=None,
        candidate_behavior_logprobs=None,
        student_top_ids=tuple(tops) or None,
    )


def check_context(
    prompt_id: Sequence[str], texts: Sequence[Ids], window_tokens: int, context: int | None
) -> None:
    """Refuse texts that do not fit a context with their window; None: there is no limit.

    Raises:
        UserError: names the prompt.
    """
    more = f"and the window {window_tokens}" if window_tokens else "with its completion"
    for name, ids in zip(prompt_id, texts, strict=True):
        if context is not None and len(ids) + window_tokens > context:
            raise UserError(
                f"prompt {name!r} has {len(ids)} tokens {more}; the model reads {context}; "
                "lower the window or max_prompt_tokens"
            )


def check_top_k(top_k: int, vocabulary: int, *, name: str = "scores.top_k") -> None:
    """Refuse more candidates than there are tokens.

    Raises:
        UserError: names both numbers and the setting.
    """
    if top_k > vocabulary:
        what = name.partition(".")[2]
        raise UserError(
            f"{what} is {top_k} but the vocabulary has {vocabulary} tokens; lower {name}"
        )


def rows_per_chunk(vocabulary: int, device: str) -> int:
    """Completion tokens whose logits exist at one time: few enough for a CPU's caches."""
    return max(MIN_CHUNK_ROWS, LOGITS_PER_CHUNK[device] // vocabulary)
