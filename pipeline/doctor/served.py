"""A check of the server that a served teacher runs on: contact, probe, candidates, throughput."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from opd_stream.engines.base import Ids, ScoringSettings
from opd_stream.store.served import open_served, served_teacher
from opd_stream.types import RolloutBatch
from pipeline.doctor.findings import Finding, check
from pipeline.doctor.subject import Subject

ROWS = 32  # prompts that are scored, to see how fast


@check(
    "a served teacher is known by what it answers; a server that is slow, or caps candidates, ends "
    "a run after its rollouts are paid for",
    loads_models=True,
)
def served(subject: Subject) -> Iterator[Finding]:
    """A teacher's server: does it give what is asked, is it the known one, and how fast is it."""
    teacher, setup = subject.config.teacher, subject.setup
    if teacher is None or teacher.server is None or setup.teacher is None:
        return
    config, options = subject.config, teacher.server
    known = served_teacher(setup.store, setup.teacher.folder, options)
    engine = open_served(setup.store, setup.teacher.folder, options)
    asked = ScoringSettings(
        top_k=config.scores.stored_candidates,
        forced_ids=setup.forced_ids,
        vocabulary=setup.candidates,
    )
    own = config.rollouts.student_top_k or config.rollouts.extra_draws
    engine.check(asked, own_ids=bool(own))
    noise, place = engine.probe().noise, f"{options.url} as {options.model!r}"
    of_it = "as the store knows it" if known else "not known to the store yet"
    yield served.ok(
        f"{place} gives the top {asked.top_k} of each token, {of_it}; two answers to one question "
        f"differ by {noise:.1e} nats in the mean"
    )
    texts = subject.table("prompts").slice(0, ROWS)["prompt_ids"].to_pylist()
    rows = [np.array(ids, np.int32) for ids in texts if len(ids) > 1]
    start = time.perf_counter()
    engine.score(_texts(rows), asked)
    rate = sum(len(ids) - 1 for ids in rows) / (time.perf_counter() - start)
    yield served.ok(f"{rate:,.0f} tokens a second, {min(len(rows), options.concurrency)} at once")


def _texts(rows: Sequence[Ids]) -> RolloutBatch:
    """Texts as completions of their first token."""
    return RolloutBatch(
        prompt_id=tuple(map(str, range(len(rows)))),
        sample_index=np.zeros(len(rows), np.int32),
        prompt_ids=tuple(ids[:1] for ids in rows),
        completion_ids=tuple(ids[1:] for ids in rows),
        behavior_logprobs=tuple(np.zeros(len(ids) - 1, np.float32) for ids in rows),
        finish_reason=("length",) * len(rows),
    )
