"""`opd-stream inspect`: checks what was asked and reads it; `terminal` and `page` show it."""

import difflib
import heapq
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.filters import OTHER_TEACHER
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.policy import known_tokenizer
from opd_stream.store.reader import ScoredRow
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_vocabulary
from opd_stream.tokens import FIGURES, TokenText, quoted
from pipeline.inspect.view import LocatedRow, RolloutView, RoundCache, RoundReader, mean_of
from pipeline.records import RoundPlanRecord
from pipeline.run_folder import RunFolder
from pipeline.setup import masked_ids
from stages.filtering import said


class WorstRollout(NamedTuple):
    """A rollout of the list."""

    view: RolloutView
    command: str  # that opens it


def inspect_rollout(
    folder: RunFolder,
    config: Config,
    *,
    round_index: int,
    prompt_id: str,
    sample: int = 0,
    cache: int | None = None,
    by: str = "reverse_kl",
) -> RolloutView:
    """One rollout of a round; `cache` None: of the newest cache that has it.

    Raises:
        UserError: it does not exist, or the scores do not hold the figure `by` of `FIGURES`.
    """
    reader = open_reader(folder, config, round_index, by)
    return reader.view(_find(reader, prompt_id, sample, cache), by)


def inspect_worst(
    folder: RunFolder, config: Config, *, round_index: int, count: int, by: str = "reverse_kl"
) -> list[WorstRollout]:
    """The `count` rollouts with the largest mean over the tokens that train, the largest first.

    Rows are read in order and let go, so memory does not grow with the round. Of equal means the
    earlier row comes first; a row of which no token trains is left out.

    Raises:
        UserError: as `inspect_rollout`, or a shard is damaged, or no rollout has the figure.
    """
    if count < 1:
        raise UserError(f"--worst is {count}; expected how many rollouts to list, at least 1")
    reader = open_reader(folder, config, round_index, by)
    if by == "reverse_kl" and all(cache.is_given for cache in reader.caches):
        raise UserError(
            f"the rollouts of round {round_index} are given, so that nobody drew them and they "
            "have no reverse_kl; expected another figure; choose --by teacher_nll"
        )
    worst: list[tuple[float, int, RoundCache, ScoredRow]] = []  # a heap: mean, -place, ...
    place = 0
    with _whole_shards():
        for cache in reader.caches:
            if cache.is_given and by == "reverse_kl":
                continue
            rows = cache.rows()
            for row in (rows[position] for position in range(len(rows))):
                mean = mean_of(reader.figures(cache, row, by)[by], reader.trains(row))
                place -= 1
                if not math.isnan(mean):
                    push = heapq.heappush if len(worst) < count else heapq.heappushpop
                    push(worst, (mean, place, cache, row))
    return [
        WorstRollout(
            reader.view(LocatedRow(cache=cache, row=row), by), command_of(reader, cache, row, by)
        )
        for _, _, cache, row in sorted(worst, key=lambda entry: entry[:2], reverse=True)
    ]


def left_out(folder: RunFolder, config: Config, *, round_index: int, count: int) -> list[str]:
    """A line for each of the first `count` rollouts that have no scores, and one for the others.

    Those that are another teacher's are none of them.

    Raises:
        UserError: a shard is damaged.
    """
    found: dict[str, None] = {}  # two teachers leave the same one out
    with _whole_shards():
        caches = _caches(folder.plan(round_index), _store(config))
        for cache, unit in [(each, unit) for each in caches for unit in each.units]:
            record = cache.scores.commit_record(unit)
            if record is None or not record.skipped_rows:
                continue
            rollouts, scores = (each.read_unit(unit) for each in (cache.rollouts, cache.scores))
            for row in record.skipped_rows:
                reason = scores["refused"][row].as_py()
                if reason is None or reason == said(OTHER_TEACHER):
                    continue
                name, sample = (rollouts[c][row].as_py() for c in ("prompt_id", "sample_index"))
                found[f"{name}, sample {sample}: {reason}"] = None
    shown = [f"left out: {line}" for line in [*found][:count]]
    more = [f"left out: {len(found) - count:,} more"] if len(found) > count else []
    return shown + more


def _store(config: Config) -> Store:
    return Store(config.store, replayed=config.replayed_store)


def open_reader(folder: RunFolder, config: Config, round_index: int, by: str) -> RoundReader:
    """The caches of a round, as its plan names them, with the tokenizer."""
    if by not in FIGURES:
        raise UserError(f"--by is {by!r}; expected one of {', '.join(FIGURES)}")
    plan = folder.plan(round_index)
    store = _store(config)
    caches = _caches(plan, store)
    tokenizer = open_vocabulary(_tokenizer_folder(config, store, caches[0]).resolve())
    return RoundReader(
        run=folder.path,
        config=config,
        store=store,
        plan=plan,
        caches=caches,
        text=TokenText(tokenizer),
        masked_ids=masked_ids(config, tokenizer),
    )


def _caches(plan: RoundPlanRecord, store: Store) -> tuple[RoundCache, ...]:
    def complete(artifact: Artifact) -> Artifact:
        if not artifact.is_complete():
            raise UserError(
                f"{artifact.name} of round {plan.round_index} is not complete; continue the run, "
                "then look again"
            )
        return artifact

    found: list[RoundCache] = []
    for number, cache in enumerate(plan.caches):
        rollouts = complete(store.by_fingerprint("rollouts", cache.rollouts))
        scores = complete(store.by_fingerprint("scores", cache.scores))
        units = tuple(scores.units()) if cache.units is None else cache.units
        found.append(
            RoundCache(
                number=number,
                rollouts=rollouts,
                scores=scores,
                units=units,
                policy_version=cache.policy_version,
                teacher=cache.teacher,
            )
        )
    return tuple(found)


def _tokenizer_folder(config: Config, store: Store, cache: RoundCache) -> Path:
    """A folder with the tokenizer of the rollouts: the student's, or that of a policy."""
    prompts, expected = cache.rollouts.recipe.inputs.get("prompts"), None
    if prompts is not None:
        expected = store.by_fingerprint("prompts", prompts).recipe.inputs["tokenizer"]
    student = config.student.folder if config.student.is_here else config.student.path
    if student.is_dir():
        own = known_tokenizer(student, cache=store.digests)
        if expected in (None, own):
            return student
    for policy in map(store.policy, store.recipes("policies")):
        if policy.is_complete() and policy.manifest().tokenizer_sha256 == expected:
            return policy.folder("texts")
    found = "has another one" if student.is_dir() else "does not exist"
    raise UserError(
        f"the tokenizer of the rollouts (digest {str(expected)[:12]}) is missing: {student} "
        f"{found}, and no policy of the store has it; give it with --set student.path=FOLDER"
    )


def _find(reader: RoundReader, prompt_id: str, sample: int, cache: int | None) -> LocatedRow:
    """The rollout of a prompt: of the newest cache that has it, or of the one that is named."""
    if cache is not None and cache not in range(len(reader.caches)):
        raise UserError(
            f"--cache is {cache}; round {reader.plan.round_index} trains on caches 0 to "
            f"{len(reader.caches) - 1}; choose one of them or leave it out"
        )
    names: dict[str, set[int]] = {}
    places: list[tuple[RoundCache, int, int]] = []
    with _whole_shards():
        chosen = [part for part in reversed(reader.caches) if cache in (None, part.number)]
        for part, unit in [(each, unit) for each in chosen for unit in each.units]:
            table = part.rollouts.read_unit(unit)
            ids, samples = (table[name].to_pylist() for name in ("prompt_id", "sample_index"))
            for row, name in enumerate(zip(ids, samples, strict=True)):
                names.setdefault(name[0], set()).add(name[1])
                if name == (prompt_id, sample):
                    places.append((part, unit, row))
        if not places:
            raise UserError(_missing(reader, prompt_id, sample, names))
        scored = [place for place in places if not _is_left_out(*place)]
        places = scored or places  # of several teachers, one that scored it
        others = tuple(other.number for other, _, _ in places[1:])
        return LocatedRow(cache=places[0][0], row=_scored(*places[0]), others=others)


@contextmanager
def _whole_shards() -> Iterator[None]:
    """Tell a damaged shard in one line."""
    try:
        yield
    except DamagedUnit as damaged:
        raise UserError(f"{damaged}; continue the run, which makes that unit again") from damaged


def _is_left_out(cache: RoundCache, unit: int, row: int) -> bool:
    record = cache.scores.commit_record(unit)
    return record is not None and row in record.skipped_rows


def _scored(cache: RoundCache, unit: int, row: int) -> ScoredRow:
    record = cache.scores.commit_record(unit)
    if record is None:
        raise DamagedUnit(cache.scores, unit, "its commit record is missing")
    if row in record.skipped_rows:
        reason = cache.scores.read_unit(unit)["refused"][row].as_py()
        why = "no token of it may train"
        if reason is not None:
            why = f"it has no scores: {quoted(reason)}"
        raise UserError(
            f"row {row} of unit {unit} of {cache.scores.name} is left out of training ({why}); "
            "choose another rollout"
        )
    before = sum(skipped < row for skipped in record.skipped_rows)
    return cache.rows([unit])[row - before]


def _missing(reader: RoundReader, prompt_id: str, sample: int, names: dict[str, set[int]]) -> str:
    where = f"round {reader.plan.round_index} of {reader.run}"
    if prompt_id in names:
        samples = ", ".join(map(str, sorted(names[prompt_id])))
        return f"{where} has no sample {sample} of prompt {prompt_id!r}; it has samples {samples}"
    near = difflib.get_close_matches(prompt_id, names, n=1) or sorted(names) or ["none"]
    return (
        f"{where} has no rollout of prompt {prompt_id!r}; it has {len(names)} prompts, such as "
        f"{near[0]!r}; `--worst 10` lists some of them"
    )


def check_question(
    prompt_id: str | None, worst: int | None, html: Path | None, has_choice: bool
) -> None:
    """Refuse a command line that asks for nothing, or for two things at once."""
    if (prompt_id is None) == (worst is None):
        found = "neither" if prompt_id is None else "both"
        raise UserError(
            f"{found} of --prompt and --worst given; expected one: --prompt ID shows a rollout, "
            "--worst N lists those to look at"
        )
    if worst is not None and has_choice:
        raise UserError(
            "--worst is of several rollouts; --sample and --cache belong to --prompt ID; "
            "leave them out"
        )
    if worst is not None:
        if html is not None and (not html.parent.is_dir() or html.is_file()):
            raise UserError(
                f"--html is {html}; expected a folder to write, in one that exists, such as "
                "rollouts/"
            )
        return
    is_page = html is None or (html.suffix in (".html", ".htm") and html.parent.is_dir())
    if not is_page or (html is not None and html.is_dir()):
        raise UserError(
            f"--html is {html}; expected a file to write in a folder that exists, such as "
            "rollout.html"
        )


def command_of(reader: RoundReader, cache: RoundCache, row: ScoredRow, by: str) -> str:
    """The command that shows a rollout."""
    words = ["opd-stream", "inspect", str(reader.run), "--round", str(reader.plan.round_index)]
    words += ["--prompt", row.prompt_id, "--sample", str(row.sample_index)]
    if len(reader.caches) > 1:
        words += ["--cache", str(cache.number)]
    if by != next(iter(FIGURES)):
        words += ["--by", by]
    return shlex.join(words)
