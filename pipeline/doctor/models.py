"""Whether student and teacher speak the same language; reads their files, loads no weights."""

import json
from pathlib import Path
from typing import Any

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.files import read_json
from pipeline.doctor.findings import Check, Finding
from stages.checkpoints import Checkpoint, check_pair

WEIGHTS = Check(
    name="weights",
    why="a torn or missing file of a checkpoint ends a worker when it loads it",
)
TOKENIZERS = Check(
    name="tokenizers",
    why="the teacher scores the ids that the student drew; if ids mean other text to it, every "
    "score is noise",
)
TERMINATORS = Check(
    name="terminators",
    why="generation stops on these ids and nothing else; an end that is not among them makes every "
    "rollout run on to its window, and an end that only one side uses is unlearnt",
)
TEMPLATES = Check(
    name="templates",
    why="prompts are written once, with the student's template, and the teacher reads the same ids",
)
Models = dict[str, Checkpoint]  # role -> checkpoint


def weights(models: Models) -> list[Finding]:
    """Files of weights that are missing or cut off."""
    findings: list[Finding] = []
    for role, model in models.items():
        try:
            count = parameters(model.folder)
            findings.append(WEIGHTS.ok(f"{role}: {count:,} parameters in {model.folder}"))
        except UserError as error:
            findings.append(WEIGHTS.refused(error))
    return findings


def parameters(folder: Path) -> int:
    """Numbers in the weights of a checkpoint, read off the headers of its files.

    Raises:
        UserError: a file is missing, cut off, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    listed = set(read_json(index)["weight_map"].values()) if index.exists() else set()
    names = sorted(listed or {path.name for path in folder.glob("*.safetensors")})
    total = 0
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{index} lists {name}, which is not there; copy the checkpoint again")
        try:
            with safe_open(path, framework="numpy") as file:
                for tensor in file.keys():  # noqa: SIM118 (it is no mapping)
                    shape = file.get_slice(tensor).get_shape()
                    total += _product(shape)
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} is no whole safetensors file ({reason}); copy the checkpoint again"
            ) from error
    return total


def tokenizers(config: Config, student: Checkpoint, teacher: Checkpoint) -> list[Finding]:
    """Ids that would not mean the same to both."""
    aligns = config.scores.alignment is not None
    try:
        check_pair(student, teacher, aligns=aligns)
    except UserError as error:
        is_end = "eos_token_id" in str(error)
        return [(TERMINATORS if is_end else TOKENIZERS).refused(error)]
    digest = student.identity.tokenizer_sha256[:12]
    if aligns and teacher.identity.tokenizer_sha256[:12] != digest:
        return [TOKENIZERS.ok("two tokenizers, whose texts scores.alignment brings together")]
    size, findings = len(student.tokenizer()), list[Finding]()
    logits = {"student": student.vocab_size(), "teacher": teacher.vocab_size()}
    for role, most in logits.items():
        if size > most:
            findings.append(
                TOKENIZERS.error(
                    f"the tokenizer has {size} ids, the {role} has logits for {most}",
                    f"resize the {role}'s embeddings, or use the tokenizer it was trained with",
                )
            )
    if logits["student"] != logits["teacher"] and not findings:
        smaller = min(logits, key=lambda role: logits[role])
        findings.append(
            TOKENIZERS.warning(
                f"the student has logits for {logits['student']} ids, the teacher for "
                f"{logits['teacher']}; the tokenizer has {size}",
                f"an id beyond the {smaller}'s last one, if it is ever drawn or among the top K, "
                "ends the run: keep scores.top_k small, or cut the larger head",
            )
        )
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    for name in special:
        own, other = (getattr(model.tokenizer(), name) for model in (student, teacher))
        if own != other:
            findings.append(
                TOKENIZERS.warning(
                    f"{name} of the student's tokenizer is {own}, of the teacher's {other}",
                    "compare tokenizer_config.json of both; prompts are written with the student's",
                )
            )
    return [TOKENIZERS.ok(f"the same files (digest {digest}), {size} ids"), *findings]


def terminators(config: Config, models: Models) -> list[Finding]:
    """Ids that end a text: do a model's own files, and the two models, agree."""
    student = models["student"]
    own = {role: set(model.terminators()) for role, model in models.items()}
    stop_ids = sorted(set().union(*own.values()))
    findings: list[Finding] = []
    for role, model in models.items():
        findings += _own_terminators(role, model, set(stop_ids))
    if "teacher" in own and own["student"] != own["teacher"]:
        merged = config.train.guards.merge_terminators
        found = (
            f"the student ends with {_named(student, own['student'])}, the teacher with "
            f"{_named(models['teacher'], own['teacher'])}"
        )
        if merged or own["student"] & own["teacher"]:
            findings.append(
                TERMINATORS.warning(
                    f"{found}; train.guards.merge_terminators is {str(merged).lower()}",
                    "leave merge_terminators on, and compare generation_config.json of both",
                )
            )
        else:
            findings.append(
                TERMINATORS.error(
                    f"{found}, none is shared, and train.guards.merge_terminators is false",
                    "set train.guards.merge_terminators=true, or give both the same eos_token_id",
                )
            )
    if stop_ids and not any(finding.level == "error" for finding in findings):
        findings.insert(0, TERMINATORS.ok(f"the run stops on {_named(student, set(stop_ids))}"))
    return findings


def _own_terminators(role: str, model: Checkpoint, stop_ids: set[int]) -> list[Finding]:
    """Whether files of one checkpoint name the same ends, and ids that exist."""
    named = {
        name: set(_listed(read_json(path).get("eos_token_id")))
        for name in ("generation_config.json", "config.json")
        if (path := model.folder / name).exists()
    }
    declared, findings = {name: ids for name, ids in named.items() if ids}, list[Finding]()
    if not declared:
        return [
            TERMINATORS.error(
                f"{role} {model.folder} names no eos_token_id",
                "add it to generation_config.json",
            )
        ]
    if len(set(map(frozenset, declared.values()))) > 1:
        told = ", ".join(f"{_named(model, ids)} in {name}" for name, ids in declared.items())
        findings.append(
            TERMINATORS.warning(
                f"the {role}'s files disagree: {told}; the run stops on all of them",
                "make eos_token_id of the files agree, unless every one of them ends a text",
            )
        )
    beyond = sorted(token for token in stop_ids if token >= model.vocab_size())
    if beyond:
        findings.append(
            TERMINATORS.error(
                f"terminator {beyond[0]} is beyond the {model.vocab_size()} ids of the {role}",
                "mend eos_token_id in generation_config.json and config.json",
            )
        )
    eos = model.tokenizer().eos_token_id
    if eos is not None and eos not in stop_ids:
        findings.append(
            TERMINATORS.error(
                f"the {role}'s tokenizer ends texts with {_named(model, {eos})}, on which the run "
                f"does not stop (it stops on {_named(model, stop_ids)})",
                "add that id to eos_token_id in generation_config.json",
            )
        )
    return findings


def templates(config: Config, models: Models) -> list[Finding]:
    """Chat templates where prompts use them."""
    parts = {} if config.evaluation is None else config.evaluation.parts()
    sources = [config.prompts, *(part.prompts for part in parts.values())]
    chats = [source.template for source in sources if source and source.template.kind == "chat"]
    there = {role: model.tokenizer().chat_template is not None for role, model in models.items()}
    if not chats:
        unused = [role for role, has_one in there.items() if has_one]
        said = f"; chat template of {' and '.join(unused)} not used" if unused else ""
        return [TEMPLATES.ok(f"prompts are raw text{said}")]
    if not there["student"]:
        return [
            TEMPLATES.error(
                "prompts.template.kind is chat, and the student's tokenizer has no chat template",
                "use a tokenizer with one, or set template.kind=raw",
            )
        ]
    findings = _turn_end(
        models["student"], set().union(*(m.terminators() for m in models.values()))
    )
    if "teacher" in models and not there["teacher"]:
        findings.append(
            TEMPLATES.warning(
                "the student's tokenizer has a chat template, the teacher's has none",
                "make sure that the teacher was trained on this format; a base model was not",
            )
        )
    elif "teacher" in models:
        system = next((chat.system for chat in chats if chat.kind == "chat" and chat.system), None)
        texts = [_conversation(model, system) for model in models.values()]
        if texts[0] != texts[1]:
            findings.append(
                TEMPLATES.warning(
                    f"student and teacher write the same turns differently: {_difference(*texts)}",
                    "use one chat template for both, unless the teacher reads the student's well",
                )
            )
    if not any(finding.level != "ok" for finding in findings):
        findings.append(TEMPLATES.ok("one chat template writes the same turns for all models"))
    return findings


def _turn_end(student: Checkpoint, stop_ids: set[int]) -> list[Finding]:
    """Whether the template ends an answer with something on which generation stops."""
    tokenizer, answer = student.tokenizer(), "ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    after = text.rpartition(answer)[2]
    ids: list[int] = tokenizer.encode(after, add_special_tokens=False)
    if stop_ids & set(ids):
        return []
    return [
        TEMPLATES.warning(
            f"the template ends an answer with {after!r}, which holds none of the ids the run "
            f"stops on ({_named(student, stop_ids)})",
            "add the id that ends a turn to eos_token_id in generation_config.json",
        )
    ]


def _conversation(model: Checkpoint, system: str | None) -> str:
    turns = [{"role": "user", "content": "How much is 2 + 3?"}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return model.tokenizer().apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _difference(left: str, right: str) -> str:
    shared = next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    return f"{left[shared : shared + 40]!r} against {right[shared : shared + 40]!r}"


def _named(model: Checkpoint, ids: set[int]) -> str:
    """Ids with the tokens they stand for."""
    if not ids:
        return "nothing"
    tokens = model.tokenizer().convert_ids_to_tokens(sorted(ids))
    return ", ".join(
        f"{number} ({json.dumps(token)})" for number, token in zip(sorted(ids), tokens, strict=True)
    )


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
