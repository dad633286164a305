"""A policy of a run as a clean folder for other programs: `opd-stream export`.

The published files of the model are copied and verified, what only training reads is left out, and
a README.md, the model card, says how the policy came to be. Nothing in the folder names this
machine.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from opd_stream.config import PLACEMENT, Config
from opd_stream.embedded import embedded_name
from opd_stream.errors import UserError
from opd_stream.hub import has_hub_form
from opd_stream.store.files import explained, inside, is_remote, sha256_file, verified_bytes
from opd_stream.store.policy import ADAPTER, DamagedPolicy, PolicyArtifact
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import NAMED_TEMPLATES
from opd_stream.tasks.distance import FIGURE_NAMES, TEXT_NAMES
from pipeline.records import Answers, MadeBy, RunSummary
from pipeline.run_folder import RunFolder, is_below

KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")
NAMES_OF_FOLDERS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
CARD = "README.md"


def export_policy(run: RunFolder, out: Path, *, version: int | None, adapter: bool) -> int:
    """Write a policy of a run with its card; the folder is there whole or not at all.

    Args:
        run: its folder.
        out: folder that must not exist yet, or be empty.
        version: of the policy, from 1; None: the last of a finished run.
        adapter: its LoRA adapter alone; False: whole weights, a run's adapters merged.

    Returns:
        The version.

    Raises:
        UserError: the folder has files, or there is no such policy or adapter.
        DamagedPolicy: a file is not the published one.
    """
    check_new(out)
    config, summary = run.config(), run.summary()
    version, policy = trained_policy(run, version)
    names = _names(policy, adapter=adapter)
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / "policy"
            folder.mkdir()
            for name in names:
                _copy(policy, name, folder / name.removeprefix(f"{ADAPTER}/"))
            base = base_name(config)
            for path in folder.glob("*.json"):
                _without_places(path, base)
            card = model_card(config, summary, run.made_by(), version, adapter=adapter)
            (folder / CARD).write_text(card, encoding="utf-8")
            folder.rename(out)
    return version


def check_new(out: Path) -> None:
    """Refuse a place that already holds something.

    Raises:
        UserError: says so.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; expected a new or empty folder; choose another")


def trained_policy(run: RunFolder, version: int | None) -> tuple[int, PolicyArtifact]:
    """A policy that a run trained, and its version, from 1; None: the last of a finished run.

    Raises:
        UserError: there is none.
    """
    version = _version(run, run.summary(), version)
    policy = Store(run.config().store).policy_by_fingerprint(run.plan(version - 1).policy)
    if not policy.is_complete():
        raise UserError(f"{policy.name} of {run.path} is not complete; continue the run")
    return version, policy


def _version(run: RunFolder, summary: RunSummary | None, version: int | None) -> int:
    known = [] if summary is None else [each.version for each in summary.policies if each.version]
    if not known:
        raise UserError(f"{run.path} has no trained policy; expected one; continue the run")
    assert summary is not None
    if version is None and not summary.finished:
        raise UserError(
            f"{run.path} is not finished ({summary.rounds} of {summary.rounds_planned} rounds); "
            f"finish it, or name a policy with --policy-version (such as {known[-1]})"
        )
    if version is not None and version not in known:
        raise UserError(
            f"{run.path} has no trained policy of version {version}; expected one of "
            f"{known[0]} to {known[-1]} (0 is the initial student, which is there already)"
        )
    return known[-1] if version is None else version


def _names(policy: PolicyArtifact, *, adapter: bool) -> list[str]:
    """The published files to copy, by their names in the policy's folder."""
    files = policy.manifest().files
    if adapter:
        parts = [name for name in files if name.startswith(f"{ADAPTER}/")]
        if not parts:
            raise UserError(
                f"{policy.name} has no adapter: its run has no train.lora; leave --adapter out"
            )
        is_weight = (".safetensors", ".safetensors.index.json")
        texts = [n for n in _names(policy, adapter=False) if not n.endswith(is_weight)]
        return [*parts, *(n for n in texts if n not in ("config.json", "generation_config.json"))]
    return [
        name
        for name in files
        if (folder := name.rpartition("/")[0]) in ("", NAMED_TEMPLATES)
        and (name.endswith(KEPT) or (not folder and name.startswith(LICENCES)))
    ]


def _copy(policy: PolicyArtifact, name: str, target: Path) -> None:
    """Copy a published file, and refuse it where it is not the published one."""
    manifest = policy.manifest()
    source = inside(inside(policy.artifact_folder, manifest.folder), name)
    target.parent.mkdir(exist_ok=True)
    try:
        if is_remote(source):
            target.write_bytes(verified_bytes(source, manifest.files[name]))
            return
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise DamagedPolicy(policy, f"{name} is missing") from error
    except UserError:
        raise
    except ValueError as error:
        raise DamagedPolicy(policy, f"{name}: {error}") from error
    if sha256_file(target) != manifest.files[name]:
        raise DamagedPolicy(policy, f"{name} is not the published file")


def _without_places(path: Path, base: str) -> None:
    """Put the base's name where a library wrote the folder that it was loaded from."""
    value = json.loads(path.read_bytes())
    places = [name for name in NAMES_OF_FOLDERS if isinstance(value, dict) and value.get(name)]
    if places:
        value |= dict.fromkeys(places, base)
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def base_name(config: Config) -> str:
    """The name of the initial student, without its folder."""
    return _name(str(config.student.path))


def _name(text: str) -> str:
    return text if has_hub_form(text) and not Path(text).exists() else Path(text).name


def model_card(
    config: Config, summary: RunSummary | None, made_by: MadeBy, version: int, *, adapter: bool
) -> str:
    """The text of README.md: what the policy is, how it was made, and how good it is."""
    base = base_name(config)
    teachers = [_name(str(each.path)) for each in config.all_teachers.values()]
    head = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "distillation", "opd-stream", *["lora"] * adapter],
    }
    if not adapter:
        head["base_model_relation"] = "finetune"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
            f"# {Path(base).name}, distilled\n",
            *_story(config, summary, version, base, teachers, adapter=adapter),
            "## Figures\n",
            *_figures(summary, version),
            "\n## Data\n",
            _fenced(recipe(config.prompts)),
            "## Recipe\n",
            "What differs from the defaults of `docs/config.md`. With the folders of models and "
            "data before their names, `opd-stream run CONFIG.yaml` makes it, and "
            f"`opd-stream export RUN OUT --policy-version {version}"
            f"{' --adapter' * adapter}` this folder.\n",
            _fenced(recipe(config)),
            "## Versions\n",
            ", ".join(f"{n} {v}" for n, v in {"python": made_by.python, **made_by.versions}.items())
            + ".\n",
            "## Licence\n",
            "None is stated; the terms of the base model, the teacher and the data apply.\n",
        ]
    )


def _story(
    config: Config,
    summary: RunSummary | None,
    version: int,
    base: str,
    teachers: list[str],
    *,
    adapter: bool,
) -> Iterator[str]:
    by = f"from {' and '.join(teachers)}" if teachers else "from the cached scores of a teacher"
    yield (
        f"`{base}` after {version} of {config.rounds} rounds of on-policy distillation {by}: "
        "the student's own rollouts, scored by the teacher, trained on from the cache of scores.\n"
    )
    lora = config.train.lora
    if adapter:
        stored = "as it is stored" if lora is None or lora.base == "stored" else lora.base
        yield f"This is the LoRA adapter alone; it was trained on the base {stored}.\n"
    elif lora is not None:
        yield "It was trained with LoRA adapters; they are merged into these weights.\n"
    if summary is not None:
        told = summary.tokens
        yield (
            f"The whole run: {told.teacher_scored:,} completion tokens scored by the teacher, "
            f"{told.trained:,} trained in {summary.steps:,} optimizer steps.\n"
        )


def _figures(summary: RunSummary | None, version: int) -> Iterator[str]:
    """A table of every figure of the policy, beside the initial student's."""
    found = () if summary is None else summary.evaluations
    own = next((each for each in found if each.round == version), None)
    first = next((each for each in found if each.round == 0), None)
    if own is None:
        yield "This policy was not evaluated."
        return
    before = {} if first is None else dict(_measured(first))
    yield "Held-out prompts; intervals of 95 %.\n"
    yield "| on | figure | initial student | this policy |\n|---|---|---|---|"
    for (name, figure), text in _measured(own):
        yield f"| {name} | {figure} | {before.get((name, figure), '')} | {text} |"


def _measured(answers: Answers) -> Iterator[tuple[tuple[str, str], str]]:
    """((benchmark, figure), value and interval)."""
    for name, entry in answers.benchmarks.items():
        for figure, (low, high) in entry.intervals.items():
            text = f"{entry.passes[figure]:.3f} [{low:.3f}, {high:.3f}]"
            yield (f"{name}, {entry.problems} problems", figure), text
    for name, distance in answers.distances.items():
        for key, found in distance.texts.items():
            for field, figure in FIGURE_NAMES.items():
                low, high = found.intervals[field]
                text = f"{getattr(found, field):.3f} [{low:.3f}, {high:.3f}]"
                yield (f"{name}, {TEXT_NAMES[key]}, {found.rows} rows", figure), text


def recipe(section: BaseModel, above: str = "") -> dict[str, Any]:
    """The settings of a section that are not its defaults, without placement and folders."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), f"{above}.{name}".lstrip(".")
        is_default = name != "kind" and value == field.get_default(call_default_factory=True)
        if not is_default and not is_below(path, PLACEMENT):
            found[name] = _plain(value, path)
    return found


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, BaseModel):
        return recipe(value, path)
    if isinstance(value, dict):
        return {key: _plain(each, f"{path}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, path) for each in value]
    if isinstance(value, Path):
        return embedded_name(value) or _name(str(value))
    if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value


def _fenced(value: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(value, sort_keys=False)}```\n"
