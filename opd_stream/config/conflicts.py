"""What fields of a config say against each other: functions of it that yield a line each."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from opd_stream.config.sections import (
    unserved_by_chunks,
    unserved_by_given,
    unserved_by_jumps,
    unserved_by_own,
    unserved_by_selection,
    unserved_by_temperature,
)
from opd_stream.rendering import RawTemplate
from opd_stream.sources import EmbeddedPrompts
from opd_stream.store.codecs import CompactCodec, HiddenCodec, SampledCodec
from opd_stream.windows import AdaptiveWindow, EntropyGatedWindow, FixedWindow, LinearWindow

if TYPE_CHECKING:
    from opd_stream.config import Config


def conflicts(config: "Config") -> Iterator[str]:
    """What fields say against each other, one line each."""
    if not config.all_teachers and config.replay is None:
        yield (
            "'teacher' is missing; expected a checkpoint that scores the rollouts; "
            "add teacher, or teachers, or set replay.run to train from the scores of an earlier run"
        )
    if (replay := config.replay) is not None and (replay.run is None) == (not replay.scores):
        yield "replay.run and replay.scores are both set, or neither; expected one of the two"
    for role, model in {"student": config.student, **config.all_teachers}.items():
        if model.engine == "vllm" and config.executor == "local":
            yield (
                f"{role}.engine is vllm with executor local, which shares a process with "
                "training; vLLM changes its process; set executor=ray"
            )
    yield from _server_conflicts(config)
    trainer = config.pools.trainer
    if trainer.is_on_ray and config.executor == "local":
        yield (
            f"pools.trainer asks for {trainer.devices} devices or a place of its own with executor "
            "local, which trains in the run's process; set executor=ray, or leave all but strategy "
            "out of pools.trainer"
        )
    yield from _objective_conflicts(config)
    yield from _given_conflicts(config)
    yield from _prefix_conflicts(config)
    yield from _environment_conflicts(config)
    yield from _extrapolation_conflicts(config)
    yield from _precision_conflicts(config)
    yield from _window_conflicts(config)
    yield from _staleness_conflicts(config)
    yield from _alignment_conflicts(config)
    yield from _following_conflicts(config)
    yield from _teachers_conflicts(config)
    yield from _select_conflicts(config)
    if config.evaluation is not None:
        yield from config.evaluation.conflicts()


def _server_conflicts(config: "Config") -> Iterator[str]:
    """A server that scores: where it stands, and what only the server decides."""
    if config.student.engine == "server":
        yield (
            "student.engine is server, which only scores; the student samples and is trained; set "
            "student.engine=transformers"
        )
    is_author = config.rollouts.given_share > 0 and config.rollouts.given_by == "teacher"
    for field, teacher in config.all_teachers.items():
        server, is_served = teacher.server, teacher.engine == "server"
        if is_served != (server is not None):
            found = "server without" if server is None else f"{teacher.engine} beside"
            yield (
                f"{field}.engine is {found} the section {field}.server; expected both or neither; "
                "add url and model of the server, or leave both out"
            )
        if is_served and teacher.follows_student:
            yield (
                f"{field}.follows_student is set with engine server, which does not run the policy "
                f"of a round; set {field}.engine=transformers"
            )
        if server is not None and server.forced == "tail" and config.scores.alignment:
            yield (
                f"{field}.server.forced is tail with scores.alignment, which reads the terminators "
                "of every position; set forced=exact, with api sglang or vllm"
            )
        if is_served and is_author:
            yield (
                f"rollouts.given_by is teacher with {field}.engine server, which only scores; set "
                f"{field}.engine=transformers, or given_by=rows"
            )
        if is_served and teacher.dtype != "float32":
            yield (
                f"{field}.dtype is {teacher.dtype} with engine server, whose precision the server "
                f"decides; leave it out ({field}.server.revision may name it)"
            )


def _objective_conflicts(config: "Config") -> Iterator[str]:
    """Objectives, against what rollouts and scores hold."""
    objectives, train, codec = config.train.objective, config.train, config.scores.codec
    kinds = ", ".join(sorted({part.kind for part in objectives}))
    if not objectives:
        yield "train.objective is an empty list; name at least one objective"
    sampled = sorted(part.kind for part in objectives if part.is_sampled)
    if (problem := unserved_by_temperature(train, config.rollouts.temperature)) is not None:
        yield problem
    if sampled and train.guards.soft_clamp is not None:
        yield (
            f"train.guards.soft_clamp is set with objective {sampled[0]}, whose losses may be "
            "negative, and so may be the mean that bounds them; leave it out"
        )
    yield from _choice_conflicts(config)
    yield from _reference_conflicts(config)
    is_drawn = isinstance(codec, SampledCodec)
    every = (*objectives, *(train.given_objective or ()))
    if any(part.reads == ("candidates" if is_drawn else "drawn") for part in every):
        yield (
            f"scores.codec is {codec.kind} with train.objective {kinds}; ids drawn from the "
            "teacher serve drawn_forward, ranked ones every other objective (sampled_pg and mc "
            "take both); change one of the two"
        )
    own = config.rollouts.student_top_k
    if own and is_drawn and config.replay is None:
        yield (
            f"rollouts.student_top_k is {own} with scores.codec sampled, which stores ids that are "
            "drawn from the teacher and no others; use codec compact or exact, or leave "
            "student_top_k out"
        )
    if own and isinstance(codec, HiddenCodec) and config.replay is None:
        yield (
            f"rollouts.student_top_k is {own} with scores.codec hidden, which gives the teacher's "
            "log-probability of every id; leave student_top_k out"
        )
    reads_draws = any(part.reads == "draws" for part in objectives)
    if reads_draws and config.replay is None and not config.rollouts.extra_draws:
        yield (
            "rollouts.extra_draws is 0 with objective mc, which averages over several draws; "
            "set rollouts.extra_draws (3 already helps), or use sampled_pg"
        )
    if train.top_k is not None and is_drawn:
        yield (
            f"train.top_k is {train.top_k} with scores.codec sampled, whose ids have no ranks; "
            "leave train.top_k out, or score again with fewer draws"
        )
    elif isinstance(codec, CompactCodec) and codec.min_k > config.scores.top_k:
        yield (
            f"scores.codec.min_k is {codec.min_k} but scores.top_k is {config.scores.top_k}, and "
            "no more candidates are scored; lower min_k or raise top_k"
        )
    elif isinstance(codec, HiddenCodec):
        return  # any number of candidates can be rebuilt
    elif train.top_k is not None and config.replay is None and train.top_k > config.scores.top_k:
        yield (
            f"train.top_k is {train.top_k} but scores.top_k is {config.scores.top_k}; lower the "
            "one or raise the other"
        )


def _choice_conflicts(config: "Config") -> Iterator[str]:
    """Tokens that train alone, against what chooses them."""
    select, segment, window = config.train.select, config.train.segment, config.rollouts.window
    if select is not None and config.replay is None:
        problem = unserved_by_selection(
            select,
            codec=config.scores.codec.kind,
            is_aligned=config.scores.alignment is not None,
        )
        if problem is not None:
            yield problem
    if segment is None:
        return
    begun = 0 if config.replay is not None else config.rollouts.prefix_tokens
    if segment.end <= segment.first:
        yield (
            f"train.segment ends at {segment.end} and begins at {segment.first}, so that no token "
            "trains; raise end"
        )
    elif segment.end <= begun:
        yield (
            f"train.segment ends at {segment.end} and rollouts.prefix_tokens is {begun}, so that "
            "no token of the student's trains; raise end, or lower prefix_tokens"
        )
    elif isinstance(window, AdaptiveWindow):
        yield (
            "train.segment is set with window adaptive, whose audits compare prefixes; use another "
            "window, or leave segment out"
        )
    elif segment.first >= window.tokens_at(0):
        yield (
            f"train.segment begins at {segment.first} and the window of step 0 has "
            f"{window.tokens_at(0)} tokens, so that none trains; lower first, or widen the window"
        )


def _reference_conflicts(config: "Config") -> Iterator[str]:
    """A second copy of the student, against what weighs tokens and what has no copies."""
    train, trainer = config.train, config.pools.trainer
    if train.reference is None:
        return
    weighed = [name for name in ("gate", "freshness", "select") if getattr(train, name) is not None]
    if weighed:
        yield (
            f"train.reference is set with train.{weighed[0]}, whose normalisation would weigh the "
            "reference, too; leave one of them out"
        )
    if train.lora is not None and train.dropout == "model":
        yield (
            "train.reference is set with train.dropout=model under adapters, whose base is then "
            "read with dropout, too; leave dropout out"
        )
    if trainer.strategy == "fsdp2" and trainer.devices > 1:
        yield (
            "train.reference is set with strategy fsdp2, and its copy of the first student is not "
            "sharded; set strategy ddp, or leave it out"
        )


def _given_conflicts(config: "Config") -> Iterator[str]:
    """Rollouts that the student does not write, and what cannot be made of them."""
    rollouts, train = config.rollouts, config.train
    share, given = rollouts.given_share, rollouts.given_prompts
    if config.replay is not None:
        return
    if rollouts.own_prompts and (problem := unserved_by_own(train)) is not None:
        yield f"rollouts.given_share is {share:g}: {problem}, or set given_share=1"
    if not share:
        if train.given_objective is not None:
            yield (
                "train.given_objective is set and rollouts.given_share is 0, so that no rollout is "
                "given; set given_share, or leave given_objective out"
            )
        return
    if not given or (share < 1 and not rollouts.own_prompts):
        yield (
            f"rollouts.given_share is {share:g} of {rollouts.prompts_per_round} prompts a round, "
            f"which is {given} of them; expected some of both kinds; raise prompts_per_round, or "
            "change given_share"
        )
    if (problem := unserved_by_given(train)) is not None:
        yield f"rollouts.given_share is {share:g}: {problem}"
    yield from _given_sources(config)


def _prefix_conflicts(config: "Config") -> Iterator[str]:
    """Rollouts that begin with tokens of others, and what cannot be made of them."""
    rollouts, window, keep = config.rollouts, config.rollouts.window, config.rollouts.keep
    if not rollouts.prefix_tokens or config.replay is not None:
        return
    field = f"rollouts.prefix_tokens is {rollouts.prefix_tokens}"
    if not config.prompts.gives_answers:
        yield (
            f"{field} and the prompts name no completion; expected the field that holds them; set "
            "prompts.completion_field, or template.final_answer=given for messages"
        )
    if rollouts.prefix_tokens >= window.tokens_at(0):
        yield (
            f"{field} and the window of step 0 has {window.tokens_at(0)} tokens, so that the "
            "student writes none; lower prefix_tokens, or widen the window"
        )
    judged = rollouts.select is not None or (keep is not None and keep.judge is not None)
    is_continued = bool(config.staleness.max_policies) and not isinstance(window, FixedWindow)
    against = {
        "rollouts.environment, whose turns begin with the student": rollouts.environment
        is not None,
        "rollouts.extra_draws, which are lost when a text is continued": rollouts.extra_draws > 0,
        "window adaptive, whose probes continue rollouts": isinstance(window, AdaptiveWindow),
        "staleness.max_policies and a growing window, which continues rollouts": is_continued,
        "scores.alignment, whose chunks may cross the border": config.scores.alignment is not None,
        "a judge of rollouts, which reads the student's part alone": judged,
    }
    for what, is_set in against.items():
        if is_set:
            yield f"{field} with {what}; leave one of the two out"


def _given_sources(config: "Config") -> Iterator[str]:
    """Where given rollouts come from, against what else a round may do."""
    rollouts, share = config.rollouts, config.rollouts.given_share
    if rollouts.given_by == "rows" and not config.prompts.gives_answers:
        yield (
            f"rollouts.given_share is {share:g} and the prompts name no completion; expected the "
            "field that holds them; set prompts.completion_field, template.final_answer=given for "
            "messages, or rollouts.given_by=teacher"
        )
    if rollouts.given_by == "teacher":
        teacher = config.teacher
        against = {
            "scores.alignment": config.scores.alignment is not None,
            "a rendering of its own": teacher is not None and teacher.is_rendering,
        }
        if found := ", ".join(name for name, is_set in against.items() if is_set):
            yield (
                f"rollouts.given_by is teacher with {found}: what it writes behind its own "
                "prompts is no answer to the student's; use a teacher that reads the same prompts, "
                "or given_by=rows"
            )
    if share < 1:
        return
    against = {
        "window adaptive, whose audits continue": isinstance(rollouts.window, AdaptiveWindow),
        "window entropy_gated, which reads": isinstance(rollouts.window, EntropyGatedWindow),
        "train.select, which chooses tokens of": config.train.select is not None,
        "train.reference, which is a term of": config.train.reference is not None,
    }
    for what, is_set in against.items():
        if is_set:
            yield (
                f"rollouts.given_share is 1 with {what} the student's rollouts; lower given_share, "
                "or leave the other out"
            )


def _environment_conflicts(config: "Config") -> Iterator[str]:
    """What rollouts of several turns cannot be, or be together with."""
    rollouts, jump = config.rollouts, config.train.extrapolation
    if rollouts.environment is None:
        return
    evaluation, sources = config.evaluation, {"prompts": config.prompts}
    if evaluation is not None and evaluation.prompts is not None:
        sources["evaluation.prompts"] = evaluation.prompts
    for name, part in (evaluation.benchmarks or {} if evaluation is not None else {}).items():
        sources[f"evaluation.benchmarks.{name}.prompts"] = part.prompts
    for field, source in sources.items():
        if isinstance(source.template, RawTemplate):
            yield (
                f"rollouts.environment is set and {field}.template.kind is raw, which knows no "
                "turns; expected a chat template, which writes the environment's; set "
                f"{field}.template={{kind: chat}}"
            )
    if config.replay is not None:
        return
    is_continued = bool(config.staleness.max_policies)
    against = {
        "rollouts.extra_draws": (
            bool(rollouts.extra_draws),
            "further draws are not kept when a rollout goes on; set it to 0",
        ),
        "rollouts.window.kind=adaptive": (
            isinstance(rollouts.window, AdaptiveWindow),
            "audits continue rollouts without the environment; use another window",
        ),
        "staleness.max_policies": (
            is_continued and not isinstance(rollouts.window, FixedWindow),
            "kept rollouts are continued to a longer window without the environment; use a fixed "
            "window",
        ),
        "scores.alignment": (
            config.scores.alignment is not None,
            "the environment's turns stand in the student's template; use a teacher with the same "
            "tokenizer",
        ),
        "train.extrapolation.signal": (
            jump is not None and jump.signal != "kl",
            "its reward samples single answers; set signal=kl",
        ),
    }
    for what, (is_set, why) in against.items():
        if is_set:
            yield f"{what} is set with rollouts.environment: {why}"


def _extrapolation_conflicts(config: "Config") -> Iterator[str]:
    """What scores a point must be there; answers need a judge, and weights that are whole."""
    jump, trainer = config.train.extrapolation, config.pools.trainer
    if jump is None:
        return
    if config.replay is None:
        problem = unserved_by_jumps(
            jump,
            codec=config.scores.codec.kind,
            is_aligned=config.scores.alignment is not None,
        )
        if problem is not None:
            yield problem
        if not config.rollouts.own_prompts:
            yield (
                "train.extrapolation measures points on rollouts of the student, and "
                f"rollouts.given_share is {config.rollouts.given_share:g}; leave it out, or lower "
                "given_share"
            )
        elif jump.signal != "reward" and config.rollouts.own_prompts == 1:
            yield (
                "train.extrapolation keeps a prompt of each round from training to score its "
                "points, and a round has one; raise rollouts.prompts_per_round"
            )
    if jump.prompts and trainer.devices > 1 and trainer.strategy == "fsdp2":
        yield (
            f"train.extrapolation.prompts is {jump.prompts}, whose answers are sampled from the "
            "model in training, with sharded weights; use strategy ddp, or signal kl with prompts=0"
        )
    if jump.signal == "kl":
        return
    if not jump.prompts:
        yield (
            f"train.extrapolation.prompts is 0 with signal {jump.signal}, which judges answers; "
            "raise it, or use kl"
        )
    if config.evaluation is None or config.evaluation.judged() is None:
        found = "there is no evaluation section" if config.evaluation is None else "it has no judge"
        yield (
            f"train.extrapolation.signal is {jump.signal}, which judges answers as "
            f"evaluation does, but {found}; add one, or use kl"
        )


def _precision_conflicts(config: "Config") -> Iterator[str]:
    """Where other numbers than float32 and AdamW's two moments cannot be."""
    train, trainer, window = config.train, config.pools.trainer, config.rollouts.window
    is_sharded = trainer.strategy == "fsdp2" and trainer.devices > 1
    if train.precision == "bf16-true":
        if train.lora is not None:
            yield (
                "train.precision is bf16-true with train.lora, whose adapters are float32 on a "
                "base in the checkpoint's own dtype; set train.precision=bf16-mixed"
            )
        if train.extrapolation is not None:
            yield (
                "train.precision is bf16-true with train.extrapolation, which moves the weights "
                "themselves; set train.precision=bf16-mixed"
            )
        if is_sharded:
            yield (
                "train.precision is bf16-true with strategy fsdp2, whose shards have one dtype; "
                "set train.precision=bf16-mixed, or strategy ddp"
            )
    if is_sharded and train.lora is not None and train.lora.base != "stored":
        yield (
            f"train.lora.base is {train.lora.base} with strategy fsdp2, whose shards have one "
            "dtype; leave base out, or set strategy ddp"
        )
    reads_moments = isinstance(window, AdaptiveWindow) and window.metric == "adam"
    resets = train.extrapolation is not None and train.extrapolation.reset_moments
    if train.optimizer != "adamw" and (reads_moments or resets or is_sharded):
        field = "rollouts.window.metric=adam" if reads_moments else "strategy fsdp2"
        field = "train.extrapolation.reset_moments" if resets else field
        yield (
            f"train.optimizer is {train.optimizer} with {field}, which reads the moments of "
            "adamw; set train.optimizer=adamw"
        )


def _window_conflicts(config: "Config") -> Iterator[str]:
    """Bounds of a window, and rollouts made ahead of a window that is not decided yet."""
    window, keep = config.rollouts.window, config.rollouts.keep
    first = window.tokens_of_round(0, config.planned_steps)
    if keep is not None and config.replay is None and keep.min_tokens > first:
        yield (
            f"rollouts.keep.min_tokens is {keep.min_tokens} and rollouts.window lets a rollout of "
            f"round 0 have {first} tokens, so that none is kept; lower min_tokens, or widen the "
            "window"
        )
    if isinstance(window, EntropyGatedWindow) and isinstance(config.scores.codec, SampledCodec):
        yield (
            "rollouts.window.kind is entropy_gated with scores.codec sampled, whose ids are draws "
            "and no distribution; use codec compact or exact"
        )
    has_start = isinstance(window, LinearWindow | EntropyGatedWindow)
    if has_start and window.h0 > window.max_window_tokens:
        yield (
            f"rollouts.window.h0 {window.h0} is larger than max_window_tokens "
            f"{window.max_window_tokens}; lower h0 or raise max_window_tokens"
        )
    if isinstance(window, AdaptiveWindow):
        if (window.start or 1) > window.max_window_tokens:
            yield (
                f"rollouts.window.start {window.start} is larger than max_window_tokens "
                f"{window.max_window_tokens}; lower start or raise max_window_tokens"
            )
        rising = list(window.candidates)
        if rising != sorted(set(rising)):
            yield (
                f"rollouts.window.candidates are {rising}; expected ascending windows; sort them"
            )
        elif rising[-1] >= window.max_window_tokens:
            yield (
                f"rollouts.window.candidates end at {rising[-1]}, which is not below "
                f"max_window_tokens {window.max_window_tokens}; raise max_window_tokens"
            )
        if window.audit_steps is not None and window.every_rounds > 1:
            yield (
                f"rollouts.window.every_rounds is {window.every_rounds} with audits every "
                f"{window.audit_steps} steps of each round; set audit_steps=null, or leave "
                "every_rounds out"
            )
        reads_draws = any(part.reads == "draws" for part in config.train.objective)
        if window.objective == "trained" and reads_draws:
            yield (
                "rollouts.window.objective is trained with train.objective mc, whose further draws "
                "probes do not have; set rollouts.window.objective=sampled"
            )
    against = {
        f"rollouts.window.kind={window.kind}": window.is_decided,
        "staleness.max_policies": bool(config.staleness.max_policies),
        "replay": config.replay is not None,
    }
    found = [name for name, is_set in against.items() if is_set]
    if config.rollouts.ahead and found:
        yield (
            f"rollouts.ahead is set with {', '.join(found)}, where a round's rollouts depend on "
            "the training before it or exist already; leave one of them out"
        )


def _staleness_conflicts(config: "Config") -> Iterator[str]:
    """Bounds that contradict each other, or that nothing can act on."""
    staleness, train = config.staleness, config.train
    if staleness.gated_from > staleness.policy_drift:
        yield (
            f"staleness.gated_from {staleness.gated_from:g} is above staleness.policy_drift "
            f"{staleness.policy_drift:g}, where training stops; lower gated_from"
        )
    if staleness.gated_from and train.gate is None and train.freshness is None:
        yield (
            f"staleness.gated_from is {staleness.gated_from:g} but nothing weighs tokens; add "
            "train.gate or train.freshness, or leave gated_from out"
        )
    if staleness.max_policies and config.replay is not None:
        yield (
            f"staleness.max_policies is {staleness.max_policies} in a replay, which samples "
            "nothing; leave it out"
        )
    elif staleness.max_policies and config.rollouts.extra_draws:
        yield (
            f"staleness.max_policies is {staleness.max_policies} with rollouts.extra_draws, whose "
            "candidates are lost when a rollout is continued; set one of the two to 0"
        )


def _alignment_conflicts(config: "Config") -> Iterator[str]:
    """What a teacher with another tokenizer cannot give."""
    if config.scores.alignment is None or config.replay is not None:
        return
    if (
        problem := unserved_by_chunks(
            config.train.objective, merge_terminators=config.train.guards.merge_terminators
        )
    ) is not None:
        yield f"scores.alignment is set: {problem}"
    if config.rollouts.extra_draws:
        yield (
            "scores.alignment is set with rollouts.extra_draws, ids that no text holds; a teacher "
            "with another tokenizer cannot score them; set rollouts.extra_draws=0"
        )
    if config.rollouts.student_top_k:
        yield (
            f"scores.alignment is set with rollouts.student_top_k "
            f"{config.rollouts.student_top_k}, ids of the student that are no tokens of a teacher "
            "with another tokenizer; leave student_top_k out"
        )
    if isinstance(config.scores.codec, SampledCodec):
        yield (
            "scores.alignment is set with codec sampled, whose draws may be no token of the "
            "student's; use codec exact or compact"
        )
    if isinstance(config.scores.codec, HiddenCodec):
        yield (
            "scores.alignment is set with codec hidden, whose distributions are over the teacher's "
            "tokens; use codec exact or compact"
        )
    reads_token = any(part.reads == "token" for part in config.train.objective)
    if config.staleness.student_top_mass and reads_token:
        yield (
            f"scores.alignment is set with staleness.student_top_mass "
            f"{config.staleness.student_top_mass:g} and sampled_pg, whose tokens have no "
            "candidates where the tokenizers differ; set staleness.student_top_mass=0"
        )


def _following_conflicts(config: "Config") -> Iterator[str]:
    """A teacher that is each round's policy has to be the student, and to read something else."""
    student = config.student
    for field, teacher in config.all_teachers.items():
        if not teacher.follows_student:
            continue
        if (teacher.path, teacher.revision) != (student.path, student.revision):
            yield (
                f"{field}.follows_student is set with {field}.path {teacher.path}, which is not "
                f"student.path {student.path}; set the same path, or leave follows_student out"
            )
        if not teacher.is_rendering:
            yield (
                f"{field}.follows_student is set without {field}.view, so that the teacher would "
                "read what the student reads and agree with it; add a view"
            )
        if config.evaluation is not None and config.evaluation.has_distance():
            yield (
                f"evaluation of kind distance with {field}.follows_student, which is another "
                "teacher each round; use a judge"
            )


def _teachers_conflicts(config: "Config") -> Iterator[str]:
    """What several teachers cannot be, or be together with."""
    if not config.teachers:
        return
    if config.teacher is not None:
        yield (
            "teacher and teachers are both set; expected one of them; give the single teacher a "
            "name under teachers, or leave one out"
        )
    for name in config.teachers:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"teachers has the name {name!r}; expected letters, digits, - and _; rename it"
    against = {
        "replay": (config.replay is not None, "leave teachers out: replay.run knows their weights"),
        "rollouts.ahead": (config.rollouts.ahead, "leave it out"),
        "rollouts.given_share": (bool(config.rollouts.given_prompts), "leave it out"),
        "rollouts.window.kind=adaptive": (
            isinstance(config.rollouts.window, AdaptiveWindow),
            "use another window",
        ),
        "staleness.max_policies": (bool(config.staleness.max_policies), "leave it out"),
        "scores.codec hidden": (
            isinstance(config.scores.codec, HiddenCodec),
            "use codec compact or exact",
        ),
        "evaluation of kind distance": (
            config.evaluation is not None and config.evaluation.has_distance(),
            "use a judge",
        ),
    }
    for what, (is_set, way) in against.items():
        if is_set:
            yield (
                f"{what} is set with teachers, and it reads the scores of one teacher; {way}, or "
                "name one teacher"
            )


def _select_conflicts(config: "Config") -> Iterator[str]:
    """What a choice of prompts by level needs, and cannot be together with."""
    if config.rollouts.select is None:
        return
    source = config.prompts
    if isinstance(source, EmbeddedPrompts) or source.level_field is None:
        yield (
            "rollouts.select is set and the prompts name no level; expected the field that holds "
            "it; set prompts.level_field (of kind files, jsonl or datasets), or leave select out"
        )
    against = {
        "replay": config.replay is not None,
        "rollouts.ahead": config.rollouts.ahead,
        "rollouts.given_share": bool(config.rollouts.given_share),
        "staleness.max_policies": bool(config.staleness.max_policies),
    }
    if found := [name for name, is_set in against.items() if is_set]:
        yield (
            f"rollouts.select is set with {', '.join(found)}, whose rollouts do not wait for the "
            "verdicts of the round before, or are not drawn by the student; leave one of them out"
        )
