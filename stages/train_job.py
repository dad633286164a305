"""One round of training as a value that can travel to other processes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_stream.config import Config
from opd_stream.config.sections import unserved_by_chunks
from opd_stream.errors import UserError
from opd_stream.filters import dropped_of, dropped_text
from opd_stream.hidden_states import exact_head, read_head
from opd_stream.objectives import Objective
from opd_stream.outcome import LevelRate, WindowAudit
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.artifact import DamagedUnit, summed_counts
from opd_stream.store.policy import ADAPTER, EXACT, OPTIMIZER, PolicyArtifact
from opd_stream.store.reader import ScoredRows
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.store.tree import load_tree
from opd_stream.weighting import Weighting
from opd_stream.windows import FixedWindow, Window
from stages.checkpoints import Vocabulary
from stages.recipes import is_given, is_unscored
from stages.reference import FirstStudent
from stages.step import CacheUnits
from stages.student_model import StudentModel, load_student
from stages.train_data import BatchPlan
from stages.train_state import load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What a process of training is told; everything else lies in the store."""

    config: Config
    policy: Recipe  # of the policy to make
    base: str  # Hugging Face folder the round starts from
    initial: str  # that of the run's first student
    is_continued: bool  # the base is a policy of this run, and the state beside it is ours
    caches: tuple[CacheUnits, ...]
    is_fresh: bool  # the newest rollouts were written by the weights the round starts from
    is_gated: bool  # a unit was kept on condition that drift weighs its tokens
    masked_ids: tuple[int, ...]  # ids whose first occurrence in a rollout does not train
    newline_ids: tuple[int, ...]  # tokens that hold a newline
    vocabulary: Vocabulary  # of sampled answers
    prompts: str  # fingerprint of the training prompts
    probe: tuple[str, str] | None  # fingerprints of the audit's rollouts and scores
    earlier_decision: WindowAudit | None  # of the audit before
    levels: tuple[LevelRate, ...]  # pass rates that decide the next round's prompts, if any do
    window_tokens: int  # of the round; an adaptive one trains with it
    first_step: int  # optimizer steps done before the round
    round_index: int
    scratch: str  # checkpoints of this round; removed when the policy is published
    metrics: str  # metrics.jsonl of the run
    made_by: str  # id of the run

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter that is continued, if there is one."""
        is_ours = self.is_continued and self.config.train.lora is not None
        return Path(self.base) / ADAPTER if is_ours else None

    def store(self) -> Store:
        """Where the caches lie and the policy goes."""
        config, waits = self.config, self.config.store_seconds
        return Store(config.store, retry_timeout=waits, replayed=config.replayed_store)

    def load_student(self, *, gradient_checkpointing: bool = False) -> StudentModel:
        """The student as the round starts with it; a new adapter is the same every time."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.first_step)
        student = load_student(
            Path(self.base),
            lora=self.config.train.lora,
            initial=Path(self.initial),
            gradient_checkpointing=gradient_checkpointing,
            adapter=self.adapter,
            drops=self.config.train.dropout == "model",
            widens=self.is_sharded,
        )
        if self.config.train.reference is not None:
            first = Path(self.initial)
            load = partial(
                load_student, first, lora=None, initial=first, gradient_checkpointing=False
            )
            student.reference = FirstStudent(self.config.train.reference, lambda: load().model)
        exact = Path(self.base) / EXACT
        if self.is_continued and exact.is_dir():
            load_weights(student, load_tree(exact))
        return student

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a shard of the weights."""
        trainer = self.config.pools.trainer
        return trainer.strategy == "fsdp2" and trainer.devices > 1

    @property
    def is_plain(self) -> bool:
        """Whether all rows were drawn at temperature 1; of imported ones nothing else is known."""
        own = [recipe for recipe in self._rollouts() if not is_given(recipe)]
        return all(recipe.settings.get("temperature", 1.0) == 1.0 for recipe in own)

    @property
    def cached_tokens(self) -> int | None:
        """The longest window of the student's own rows; None: not known, of imported ones."""
        own = [recipe for recipe in self._rollouts() if not is_given(recipe)]
        if any("window_tokens" not in recipe.settings for recipe in own):
            return None
        return max((recipe.settings["window_tokens"] for recipe in own), default=None)

    def _rollouts(self) -> list[Recipe]:
        """The recipes of the rollouts of each cache."""
        store = self.store()
        return [store.by_fingerprint("rollouts", cache.rollouts).recipe for cache in self.caches]

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass is another one than a measuring pass."""
        train = self.config.train
        return train.dropout == "model" or (train.lora is not None and train.lora.dropout > 0)

    def previous_moments(self) -> dict[str, Any] | None:
        """Optimizer moments that the round before left, {parameter name: moments}."""
        return load_tree(Path(self.base) / OPTIMIZER) if self.is_continued else None

    def target(self) -> PolicyArtifact:
        """The policy to make."""
        return self.store().policy(self.policy)

    def earlier_floor(self) -> float | None:
        """The drift floor that the round before read drift above; None: none is measured yet."""
        previous = self.policy.inputs.get("optimizer")
        if previous is None:
            return None
        policy = self.store().policy_by_fingerprint(previous)
        return policy.manifest().outcome.start.floor

    def rows(self) -> ScoredRows:
        """The rows to train on.

        Raises:
            UserError: there is none, or they hold fewer candidates than the config asks for.
        """
        store = self.store()
        artifacts = [
            (
                store.by_fingerprint("rollouts", cache.rollouts),
                store.by_fingerprint("scores", cache.scores),
            )
            for cache in self.caches
        ]
        asked = self.config.train.top_k
        for _, scores in artifacts:
            if is_unscored(scores.recipe):
                continue
            if "head" in scores.recipe.inputs:  # any number can be rebuilt of hidden states
                continue
            cached = scores.recipe.settings.get("top_k", asked)  # unknown of imported rows
            if asked is not None and scores.recipe.settings["codec"]["kind"] == "sampled":
                raise UserError(
                    f"train.top_k is {asked} but {scores.name} holds ids drawn from the teacher, "
                    "which have no ranks; leave train.top_k out"
                )
            if asked is not None and asked > cached:
                raise UserError(
                    f"train.top_k is {asked} but {scores.name} holds {cached} candidates a token; "
                    "lower it, or score again with a larger scores.top_k"
                )
            problem = unserved_by_chunks(
                self.config.train.objective,
                merge_terminators=self.config.train.guards.merge_terminators,
            )
            if "alignment" in scores.recipe.settings and problem is not None:
                raise UserError(f"{scores.name} was scored across tokenizers: {problem}")
        is_aligned = any("alignment" in scores.recipe.settings for _, scores in artifacts)
        rows = ScoredRows(
            artifacts,
            units=[[slot.unit for slot in cache.slots] for cache in self.caches],
            vocabulary=None if is_aligned else self.vocabulary.head,
        )
        if not len(rows):
            scored = (commit for _, each in artifacts for commit in each.commits().values())
            dropped = dropped_of(summed_counts(scored))
            if dropped:
                raise UserError(
                    f"no rollout of round {self.round_index} can be trained on: "
                    f"{dropped_text(dropped)}; loosen its conditions, or raise "
                    "rollouts.samples_per_prompt"
                )
            raise UserError(
                "no rollout can be trained on: every one is empty or was refused by the teacher; "
                "look at the teacher's checkpoint, then run the score stage again"
            )
        return rows

    def teacher(self, device: torch.device, *, vocabulary: int) -> TeacherHead | None:
        """What rebuilds the teacher's distributions of cached hidden states; None: none are cached.

        Args:
            device: of training.
            vocabulary: ids that the student's head has.

        Raises:
            UserError: caches hold states of several heads, or some hold none; the store lacks it.
        """
        store, asked = self.store(), self.config.train.top_k
        scores = [store.by_fingerprint("scores", cache.scores) for cache in self.caches]
        scores = [each for each in scores if not is_unscored(each.recipe)]
        heads = {each.recipe.inputs.get("head") for each in scores} or {None}
        if heads == {None}:
            return None
        (fingerprint, *others) = heads
        if others or fingerprint is None:
            raise UserError(
                f"{', '.join(sorted(each.name for each in scores))} hold hidden states of several "
                "teachers, or some hold none; expected one teacher and codec hidden in all; train "
                "on them apart"
            )
        try:
            head = exact_head(read_head(store.by_fingerprint("heads", fingerprint), str(device)))
        except DamagedUnit as error:
            raise UserError(
                f"{error}; restore it, or remove {scores[0].name} from the store to score again"
            ) from error
        known = scores[0].recipe.settings.get("vocabulary", len(head.weight_VH))
        candidates = min(known, vocabulary, len(head.weight_VH))
        if asked is not None and asked > candidates:
            raise UserError(
                f"train.top_k is {asked} but there are {candidates} tokens; lower it, or leave it "
                "out to train on the whole vocabulary"
            )
        return TeacherHead(head=head, top_k=asked, vocabulary=candidates)

    def window(self) -> Window:
        """The training window; one that is decided is what the round before decided."""
        if self.config.rollouts.window.is_decided:
            return FixedWindow(tokens=self.window_tokens)
        return self.config.rollouts.window

    def objectives(self) -> tuple[Objective, ...]:
        """What to minimise."""
        return self.config.train.objective

    def weighting(self) -> Weighting | None:
        """How measured drift, and a choice of tokens, weigh them."""
        train = self.config.train
        if train.gate is None and train.freshness is None and train.select is None:
            return None
        return Weighting(gate=train.gate, freshness=train.freshness, select=train.select)

    def plan(self) -> BatchPlan:
        """Which rows meet in which step."""
        train, weights = self.config.train, tuple(cache.weight for cache in self.caches)
        return BatchPlan(
            rows_per_step=train.rows_per_step,
            tokens_per_microbatch=train.tokens_per_microbatch,
            seed=self.config.seed,
            first_step=self.first_step,
            window=self.window(),
            top_k=train.top_k,
            same_tokens_only=any(part.reads != "token" for part in train.objective),
            masked_ids=self.masked_ids,
            segment=train.segment,
            blocks=64 if train.gate is None else train.gate.blocks,
            newline_ids=self.newline_ids,
            staleness=tuple(self.round_index - cache.policy_version for cache in self.caches),
            given=tuple(map(is_given, self._rollouts())),
            weights=weights if any(weight != 1 for weight in weights) else (),
        )
