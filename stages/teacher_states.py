"""Scores with hidden states: the teacher reads once, its head and its states give the rest.

What states are rounded in, a basis, is an artifact of its own: fitted once by whichever worker
needs it first, on the teacher's states on the first prompts, and read back from the store by all,
so that every unit, worker and resumed run has the same one. Which prompts it was fitted on decides
bytes, never what rounding may cost: that is measured for every unit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines import hidden_engine
from opd_stream.engines.base import Engine, HiddenEngine, ScoringSettings
from opd_stream.errors import UserError
from opd_stream.hidden_states import StateRounding, exact_head, fit_basis, scores_of_states
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import HiddenCodec, StateBasis, codec_of
from opd_stream.store.codecs.fidelity import StateErrors, state_errors
from opd_stream.store.codecs.hidden import basis_of, basis_table
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch, ScoreBatch
from stages.prompts import Ids, prompts_in_turn
from stages.recipes import basis_recipe, head_beside
from stages.teacher_head import check_bound, make_head

STATES_PER_CHANNEL = 4  # of those that a basis is fitted on, where the prompts hold as many


class StateScorer:
    """An engine that scores rollouts for one recipe of codec hidden."""

    def __init__(
        self, store: Store, scores: Recipe, prompts: str, opened: Callable[[], Engine], made_by: str
    ) -> None:
        """Store head and basis, unless they are there.

        Args:
            store: of the scores.
            scores: their recipe.
            prompts: fingerprint of the prompts as the teacher reads them.
            opened: gives the engine with the teacher's weights.
            made_by: id of the run.
        """
        make_head(store, scores, opened, made_by)
        codec = codec_of(scores.settings["codec"])
        assert isinstance(codec, HiddenCodec)
        self._codec, self._engine = codec, hidden_engine(opened())
        self._head = exact_head(self._engine.head())
        self.width = self._head.weight_VH.shape[1]  # of a state
        self._rounding: StateRounding | None = None
        self.basis: StateBasis | None = None  # of rounded states
        if codec.max_kl is not None:
            artifact = store.artifact(basis_recipe(head_beside(scores), prompts))
            prompt_ids = prompts_in_turn(store, prompts)
            self.basis = _made_basis(artifact, self._engine, prompt_ids, made_by)
            self._rounding = StateRounding(self.basis, self._head)

    def score(
        self, rollouts: RolloutBatch, settings: ScoringSettings
    ) -> tuple[ScoreBatch, StateErrors | None]:
        """Scores with states, and what rounding those cost; None: they are not rounded.

        Raises:
            UserError: it costs more than the codec allows, or the head does not give the engine's
                distributions.
        """
        hidden = self._engine.hidden(rollouts)
        scored = scores_of_states(hidden, self._head, rollouts, settings)
        pairs = zip(scored.teacher_logprobs, hidden.logprobs, strict=True)
        kept = [(own, engine) for own, engine in pairs if len(own)]
        if kept:
            own, engines = (np.concatenate(side) for side in zip(*kept, strict=True))
            check_bound(own, engines, self._engine.head())
        if self._rounding is None or self._codec.max_kl is None:
            return scored, None
        assert scored.teacher_states is not None
        states_NH = np.concatenate(scored.teacher_states)
        bounds = (self._codec.max_kl, self._codec.max_kl_p99)
        rounded = self._rounding.rounded(states_NH, max_kl=bounds[0], max_kl_p99=bounds[1])
        check_rounding(rounded.kl_N, *bounds)
        ends = np.cumsum([len(row) for row in scored.teacher_states])[:-1]
        rows = tuple(np.split(rounded.integers_NH, ends))
        return replace(scored, teacher_states=rows), state_errors(rounded.kl_N)


def check_rounding(kl_N: NDArray[np.float64], max_kl: float, max_kl_p99: float) -> None:
    """Refuse what rounding cost (nats, of each token), if it is too much.

    Raises:
        UserError: names both bounds and what was reached.
    """
    if not len(kl_N):
        return
    mean, p99 = float(kl_N.mean()), float(np.quantile(kl_N, 0.99))
    if mean <= max_kl and p99 <= max_kl_p99:
        return
    raise UserError(
        f"hidden states cannot be stored: rounded, they cost {mean:.2g} nats a token in the mean "
        f"and {p99:.2g} at the 99th percentile; scores.codec.max_kl is {max_kl:g}, max_kl_p99 "
        f"{max_kl_p99:g}; raise them, or set scores.codec.max_kl=null, which rounds nothing"
    )


def _made_basis(
    artifact: Artifact, engine: HiddenEngine, prompts: Iterator[Ids], made_by: str
) -> StateBasis:
    """The basis that the store has, made if it is missing: always what was read back."""
    artifact.create(rows=1, rows_per_unit=1)
    if not artifact.has_sound(0):
        states_NH = _states_on_prompts(engine, prompts, artifact.recipe)
        basis = fit_basis(states_NH, exact_head(engine.head()))
        artifact.commit(0, basis_table(basis), counts={"rows": 1}, made_by=made_by)
    artifact.finish()
    return basis_of(artifact.read_unit(0))


def _states_on_prompts(
    engine: HiddenEngine, prompts: Iterable[Ids], recipe: Recipe
) -> NDArray[np.float32]:
    """States at the first places of prompts, each prefix once [N, H]."""
    width = engine.head().weight_VH.shape[1]
    wanted, seen = max(recipe.settings["tokens"], STATES_PER_CHANNEL * width), set[bytes]()
    chosen: list[Ids] = []
    new: list[NDArray[np.bool_]] = []
    for ids in prompts:
        if sum(int(part.sum()) for part in new) >= wanted:
            break
        prefixes = [ids[: place + 1].astype(np.int64).tobytes() for place in range(len(ids))]
        new.append(np.array([prefix not in seen for prefix in prefixes]))
        seen.update(prefixes)
        chosen.append(ids)
    rows = range(len(chosen))
    texts = RolloutBatch(
        prompt_id=tuple(map(str, rows)),
        sample_index=np.zeros(len(chosen), np.int32),
        prompt_ids=tuple(ids[:1] for ids in chosen),
        # A state predicts the token after it; which one that is changes nothing, so 0 is the last.
        completion_ids=tuple(np.append(ids[1:], 0) for ids in chosen),
        behavior_logprobs=tuple(np.zeros(len(ids), np.float32) for ids in chosen),
        finish_reason=("length",) * len(chosen),
    )
    states = engine.hidden(texts).states
    kept = [row[is_new] for row, is_new in zip(states, new, strict=True)]
    states_NH = np.concatenate(kept)[:wanted]
    return states_NH[np.isfinite(states_NH).all(1)]
