"""A teacher that runs elsewhere: a server scores, and nothing of the model is loaded here.

Which model answers is not known from files, so it is found out by asking: a fixed text, the probe,
has the log-probabilities that this model gives it. They are asked for when the engine opens and
with every batch, before its scores are returned, and compared with those that the store has of the
teacher (`opd_stream.store.served`). Two answers of one server differ by some rounding, which is
measured first.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines.base import (
    RowScores,
    SamplingSettings,
    ScoringSettings,
    check_top_k,
    score_batch,
)
from opd_stream.engines.server_client import ServerClient, ServerOptions
from opd_stream.engines.server_forms import Answer, Question, most_bytes, open_form
from opd_stream.engines.vllm_scores import (
    asked_ids,
    asked_top_k,
    scores_of_candidates,
    scores_of_whole,
)
from opd_stream.errors import UserError
from opd_stream.model_config import read_model_config
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

MAX_WHOLE_VOCABULARY = 8192  # that is read whole where single ids cannot be asked for
PROBE_TOKENS = 64
PROBE_TOP = 4  # candidates that are compared, by rank
COPIES = 8  # of the probe at once, when it is first asked for
MOST_NOISE = 0.05  # nats, of one model; other precisions are further (benchmarks/served.py)
FLOOR, FACTOR = 2e-3, 2.0  # nats; a probe may be off by the floor, or so many times the noise


class Probe(NamedTuple):
    """What a server says of the probe."""

    values: NDArray[np.float64]  # [PROBE_TOKENS, 1 + PROBE_TOP], token, candidates by rank; nats
    noise: float  # largest mean |difference| of two answers, nats


class ServerEngine:
    """Implements `Engine` as far as a server that only scores can.

    `expected` are the probe's values of the teacher; None: nothing is compared, as at the first
    contact.
    """

    def __init__(
        self, folder: Path, options: ServerOptions, *, expected: Probe | None = None
    ) -> None:
        """Raises UserError where the key is missing."""
        self._options, self._expected = options, expected
        self._client, self._form = ServerClient(options), open_form(options)
        self._vocabulary = read_model_config(folder).vocabulary
        self._probe_ids = probe_ids(self._vocabulary)
        self._pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="teacher")
        self.noise = 0.0 if expected is None else expected.noise

    def load(self, folder: Path) -> None:
        """A server's weights are its own.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{folder} cannot be loaded into the server {self._options.url}; open another engine"
        )

    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """Raises UserError: a served teacher only scores."""
        raise UserError(_ONLY_SCORES)

    def extend(self, rollouts: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
        """Raises UserError: a served teacher only scores."""
        raise UserError(_ONLY_SCORES)

    def probe(self) -> Probe:
        """Ask for the probe alone and several times at once.

        Raises:
            UserError: the server cannot be asked, or its answers are those of several models.
        """
        first = self._probe()
        copies = list(self._all([self._probe] * min(COPIES, self._options.concurrency)))
        noise = max(distance(first, copy) for copy in copies)
        if noise > MOST_NOISE:
            raise UserError(
                f"{self._options.url} gave the same text log-probabilities that differ by "
                f"{noise:.2g} nats in the mean; expected at most {MOST_NOISE:g} of one model: "
                "servers behind this address run different models; let them run the same"
            )
        return Probe(first, noise)

    def check(self, settings: ScoringSettings, *, own_ids: bool) -> None:
        """Ask for the scores of the probe as those of rollouts will be asked for.

        Args:
            settings: of the scores.
            own_ids: whether rollouts hold ids of the student's own to be scored.

        Raises:
            UserError: the server does not give them, or another model answers.
        """
        self._check_asked(settings, own_ids=own_ids)
        if self._expected is not None:
            for copy in self._all([self._probe] * min(COPIES, self._options.concurrency)):
                self._compare(copy)
        last, ids = self._probe_ids[-1:], np.arange(min(2, self._vocabulary), dtype=np.int32)
        rollouts = RolloutBatch(
            prompt_id=("probe",),
            sample_index=np.zeros(1, np.int32),
            prompt_ids=(self._probe_ids[:-1],),
            completion_ids=(last,),
            behavior_logprobs=(np.zeros(1, np.float32),),
            finish_reason=("length",),
            student_top_ids=(ids[None],) if own_ids else None,
        )
        self._scored(rollouts, 0, settings)

    def score(self, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
        """See `Engine.score`.

        Raises:
            UserError: the server cannot be asked for them, or another model answers.
        """
        own = rollouts.student_top_ids is not None or rollouts.candidate_ids is not None
        self._check_asked(settings, own_ids=own)
        work: list[Any] = [
            partial(self._scored, rollouts, row, settings) for row in range(len(rollouts))
        ]
        if self._expected is None:
            return score_batch(self._all(work), rollouts)
        work.insert(len(work) // 2, self._probe)  # in the midst of them
        found = list(self._all(work))
        self._compare(found.pop(len(rollouts) // 2))
        return score_batch(found, rollouts)

    def _all(self, work: Sequence[Any]) -> Iterable[Any]:
        """The results in order; where one fails, the others are ended."""
        self._client.resume()
        futures = [self._pool.submit(each) for each in work]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            self._client.stop()
            raise

    def _check_asked(self, settings: ScoringSettings, *, own_ids: bool) -> None:
        """Refuse what this form of server cannot be asked for."""
        check_top_k(settings.top_k, settings.vocabulary or self._vocabulary)
        if settings.draws:
            raise UserError(
                "scores.codec is sampled, which needs draws from the teacher's whole distribution; "
                "a server returns its top candidates only; use codec compact or exact"
            )
        if self._form.gives_ids or self._reads_whole:
            return
        api = self._options.api
        if own_ids:
            raise UserError(
                f"teacher.server.api {api} cannot be asked for ids of the student's own, and the "
                f"vocabulary of {self._vocabulary:,} is too large to be read whole; leave out "
                "rollouts.student_top_k and extra_draws, or use api sglang or vllm"
            )
        if settings.forced_ids and self._options.forced == "exact":
            raise UserError(
                f"teacher.server.api {api} cannot be asked for {len(settings.forced_ids)} forced "
                "ids (terminators, scores.forced_tokens) that are none of the top "
                f"{settings.top_k}; set teacher.server.forced=tail, which leaves them in the tail, "
                "or use api sglang or vllm"
            )

    @property
    def _reads_whole(self) -> bool:
        """Whether every id is asked for, so that given ones are among them."""
        is_small = self._vocabulary <= MAX_WHOLE_VOCABULARY
        return is_small and not self._form.gives_ids and self._options.forced == "exact"

    def _scored(self, rollouts: RolloutBatch, row: int, settings: ScoringSettings) -> RowScores:
        """The scores of one rollout, by one request."""
        own = rollouts.student_top_ids
        own_TS = None if own is None else own[row].astype(np.int32)
        given_TJ = asked_ids(rollouts, row, settings.forced_ids)
        forced, limit = len(settings.forced_ids), settings.vocabulary
        if limit is not None and limit >= self._vocabulary:
            limit = None
        top_k = asked_top_k(settings.top_k, limit, self._vocabulary)
        answer = self._answer(rollouts, row, given_TJ, top_k)
        if self._reads_whole and len(given_TJ):
            dense_TV = np.full((len(given_TJ), self._vocabulary), np.nan, np.float32)
            np.put_along_axis(dense_TV, answer.top_ids_TK.astype(np.int64), answer.top_TK, axis=1)
            student = 0 if own_TS is None else own_TS.shape[1]
            return scores_of_whole(
                dense_TV,
                given_TJ,
                top_k=settings.top_k,
                forced=forced,
                limit=limit,
                student_top_k=student,
            )
        asked_TJ = answer.given_TJ
        if asked_TJ is None:
            asked_TJ = _found(answer, given_TJ)
        asked_TJ = np.concatenate([answer.drawn_T[:, None], asked_TJ[:, 1:]], axis=1)
        return scores_of_candidates(
            answer.top_ids_TK,
            answer.top_TK,
            asked_TJ,
            top_k=settings.top_k,
            forced=forced,
            limit=limit,
            own_TS=own_TS,
        )

    def _answer(
        self, rollouts: RolloutBatch, row: int, given_TJ: NDArray[np.int32], top_k: int
    ) -> Answer:
        prompt, completion = rollouts.prompt_ids[row], rollouts.completion_ids[row]
        if not len(completion):
            nothing = np.zeros((0, top_k), np.float32)
            return Answer(nothing[:, 0], nothing.astype(np.int32), nothing)
        has_ids = self._form.gives_ids and given_TJ.shape[1] > 1
        asked = Question(
            ids_L=np.concatenate([prompt, completion]),
            first=len(prompt),
            top_k=self._vocabulary if self._reads_whole else top_k,
            given_TJ=given_TJ if has_ids else None,
        )
        return self._ask(asked)

    def _ask(self, asked: Question) -> Answer:
        return self._client.ask(
            self._form.path,
            self._form.question(asked),
            read=lambda data: self._form.read(data, asked),
            most_bytes=most_bytes(asked),
        )

    def _probe(self) -> NDArray[np.float64]:
        answer = self._ask(Question(ids_L=self._probe_ids, first=1, top_k=PROBE_TOP))
        return np.concatenate([answer.drawn_T[:, None], answer.top_TK], axis=1, dtype=np.float64)

    def _compare(self, found: NDArray[np.float64]) -> None:
        """Refuse an answer of another model than the one that is expected.

        Raises:
            UserError: says by how much it differs.
        """
        assert self._expected is not None
        gap, most = distance(self._expected.values, found), tolerance(self._expected.noise)
        if not gap <= most:
            options = self._options
            raise UserError(
                f"another model answers at {options.url} than the teacher {options.model!r} of "
                f"this store: log-probabilities of a fixed text differ by {gap:.2g} nats in the "
                f"mean, and {most:.2g} are allowed; nothing of it was kept; serve the same model "
                "in the same precision, or name another teacher with teacher.server.revision"
            )


_ONLY_SCORES = (
    "a served teacher only scores; expected an engine that samples; use teacher.engine=transformers"
)


def probe_ids(vocabulary: int) -> NDArray[np.int32]:
    """The probe: ids spread over a vocabulary [1 + PROBE_TOKENS]."""
    steps = np.arange(1 + PROBE_TOKENS, dtype=np.int64)
    return ((steps * 7919 + steps * steps * 104_729) % vocabulary).astype(np.int32)


def distance(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Mean |difference| of two answers to the probe, nats; infinite where one is no number."""
    gaps = np.abs(left - right)
    return float(gaps.mean()) if np.isfinite(gaps).all() else float("inf")


def tolerance(noise: float) -> float:
    """By how much a probe may be off, nats."""
    return max(FLOOR, FACTOR * noise)


def _found(answer: Answer, given_TJ: NDArray[np.int32]) -> NDArray[np.float32]:
    """Given ids among the candidates [T, J]; -inf marks those that are in the tail."""
    is_it = answer.top_ids_TK[:, None] == given_TJ[:, :, None]
    found = np.where(is_it, answer.top_TK[:, None], -np.inf).max(2, initial=-np.inf)
    is_drawn = given_TJ == given_TJ[:, :1]
    return np.where(is_drawn, answer.drawn_T[:, None], found).astype(np.float32)
